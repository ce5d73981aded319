"""The training loop: an adapter is pushed away from the forget rows and held on the retain rows, a step at a time.

Every step is a function of the seed, the step's number and the weights before it: which rows, which dropout masks,
which learning rate. So a run that was killed goes on from its last kept state to the same bytes as one that was not,
and what is kept is plain tensors (safetensors): the adapter and AdamW's two moments.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from app.influence.building import batches
from app.influence.corpus import Example
from app.influence.errors import SpecError
from app.influence.gradients import target_logits, target_losses
from app.influence.index import write_file
from app.influence.models import LoadedModel
from app.unlearning.adapter import Adapter
from app.unlearning.fisher import Importances, dampened
from app.unlearning.objectives import loss_weights, npo, simnpo, weighted_ascent

Method = Literal[
    "rapidun", "ga", "graddiff", "npo", "simnpo", "loreun", "fisher", "dampen", "relabel", "renew", "bounded", "retrain"
]
WARM_UP = 0.1  # of all steps
PROBE = 32  # retain rows that are measured to see what is lost
STATE = "state.safetensors"
BETA = {"npo": 0.1, "simnpo": 2.5}
NEEDS_CLEAN = ("relabel", "renew")
NEEDS_KNOWN = ("npo", "loreun", "bounded")
"""Methods that need the forget rows' losses from before."""
BUDGET = 1024
"""Padded tokens a batch of those measurements that take no gradient."""
WITHOUT_RETAIN = ("ga",)
DAMPENING = ("fisher", "dampen")
BEGINNING = 4
"""Tokens of an answer that count as having begun it."""
HALVINGS = 6
RENEW = 1.5
"""renew's selection threshold."""


@dataclass(frozen=True)
class TrainingSpec:
    """How to train; the defaults are RapidUn's (METHODS section 4).

    Attributes:
        epochs: passes over the forget rows (for retrain: over the retain rows).
        batch: rows a step, retain and forget rows 3:1.
        ascent, descent: RapidUn's alpha and beta: the pull of the forgotten and of the clean answer.
        ascent, descent of bounded: the same two pulls, the first through npo, which ends where ascent has no end.
        beta, gamma: of npo, bounded and simnpo; no beta means the paper's (`BETA`).
        temperature: of loreun's weights.
        selection, dampening: SSD's alpha and lambda, of fisher (`fisher.dampened`); dampen looks for its own threshold.
        rank, alpha, dropout: of the adapter, where the model brings none.
        most_rise: how far the retain rows' mean loss may rise, relative to before, until training stops.
    """

    method: Method = "rapidun"
    lr: float = 6e-5
    epochs: float = 2.0
    batch: int = 8
    ascent: float = 1.0
    descent: float = 0.5
    beta: float | None = None
    gamma: float = 0.0
    temperature: float = 1.0
    selection: float = 10.0
    dampening: float = 1.0
    rank: int = 16
    alpha: int = 16
    dropout: float = 0.05
    clip: float = 1.0
    most_rise: float = 0.5
    check_every: int = 10
    seed: int = 0


def require_rows(method: Method, forget: int, retain: int, clean: int) -> None:
    """Raise SpecError where there are too few rows, or clean answers of rows to forget, for a method."""
    if method != "retrain" and not forget:
        raise SpecError("there is nothing to forget: no row was chosen", field="forget")
    if method not in WITHOUT_RETAIN and not retain:
        raise SpecError(f"{method} needs rows to retain", field="retain")
    if method in NEEDS_CLEAN and clean < forget:
        raise SpecError(f"{method} needs a clean answer for every row to forget", field="clean")


@dataclass(frozen=True)
class TrainingRow:
    """A row to forget or to keep; `clean` is what the model should have said."""

    example: Example
    weight: float = 1.0
    clean: Example | None = None


@dataclass(frozen=True)
class Step:
    """What a step did; losses are means over its rows, in nats a token.

    renew's rows whose importances are summed before its training are steps of the stage "importances".
    """

    number: int
    total: int
    forget_loss: float | None
    retain_loss: float | None
    stopped: str | None = None
    stage: Literal["importances", "training"] = "training"


@dataclass
class Unlearner:
    """One run: a model of its own, which it changes, its rows and its folder."""

    model: LoadedModel
    spec: TrainingSpec
    forget: Sequence[TrainingRow]
    retain: Sequence[TrainingRow]
    folder: Path
    keep_every: int = 50

    def __post_init__(self) -> None:
        """Raises SpecError for rows that the method cannot work with."""
        spec = self.spec
        clean = sum(row.clean is not None for row in self.forget)
        require_rows(spec.method, len(self.forget), len(self.retain), clean)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.adapter = Adapter(self.model, rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout, seed=spec.seed)
        if spec.method == "retrain":
            self.adapter.forget_everything()
        if spec.method in (*DAMPENING, "renew"):
            self._check_selection()
        self.steps: list[Step] = []
        self._weights = self.adapter.weights
        self.optimizer = torch.optim.AdamW(list(self._weights.values()), lr=spec.lr, weight_decay=0.0)
        rng = random.Random(spec.seed)  # noqa: S311 (no secret)
        self._probe = [row.example for row in rng.sample(self.retain, min(PROBE, len(self.retain)))]

    @property
    def _most(self) -> float:
        """How many times as much a weight can matter to the forget rows as to all rows."""
        return (len(self.forget) + len(self.retain)) / len(self.forget)

    def _check_selection(self) -> None:
        if not self.adapter.own:
            detail = f"{self.spec.method} dampens what an adapter has learned, and this model has none"
            raise SpecError(detail, field="method")
        most = self._most
        if self.spec.method == "fisher" and self.spec.selection >= most:
            detail = (
                f"{len(self.forget)} rows to forget among {len(self.forget) + len(self.retain)}: no weight can matter "
                f"{self.spec.selection:g} times as much to them as to all; take a selection below {most:.3g}"
            )
            raise SpecError(detail, field="selection")

    @property
    def per_step(self) -> tuple[int, int]:
        """(forget, retain) rows of a step."""
        if self.spec.method == "retrain":
            return 0, self.spec.batch
        if self.spec.method in WITHOUT_RETAIN:
            return self.spec.batch, 0
        return max(1, self.spec.batch // 4), self.spec.batch - max(1, self.spec.batch // 4)

    @property
    def total(self) -> int:
        """Steps in all."""
        if self.spec.method in DAMPENING:
            return len(self.forget) + len(self.retain)
        forget, retain = self.per_step
        rows, each = (len(self.forget), forget) if forget else (len(self.retain), retain)
        return max(1, math.ceil(self.spec.epochs * rows / each))

    def run(self) -> Iterator[Step]:
        """Train, a step at a time; from the last kept state if there is one.

        It ends early where the retain rows' loss rises past the bound or a loss is not finite: the adapter is then the
        last one that was good, and the last step says why.
        """
        if self.spec.method in DAMPENING:
            yield from self._dampen()
            return
        before = self.mean_loss(self._probe) if self._probe else 1.0
        known = self._known()
        if self.spec.method == "renew":
            yield from self._weaken()
        done = self._restore()
        good = self.adapter.copy()
        for number in range(done + 1, self.total + 1):
            step = self._step(number, known)
            keep = number % self.keep_every == 0
            if step is None:
                step = Step(number, self.total, None, None, "the loss was no longer finite")
            elif keep or number % self.spec.check_every == 0 or number == self.total:
                risen = self.mean_loss(self._probe) / before - 1 if self._probe else 0.0
                if risen <= self.spec.most_rise:
                    good = self.adapter.copy()
                else:
                    allowed = f"more than the {self.spec.most_rise:.0%} allowed"
                    stopped = f"the retain rows' loss rose by {risen:.0%}, {allowed}"
                    step = Step(number, self.total, None, None, stopped)
            self.steps.append(step)
            if step.stopped is not None:
                self.adapter.put(good)
                yield step
                return
            if keep:  # what is kept has been found good: a run that goes on from it falls back to it too
                self._keep(number)
            yield step

    def _dampen(self) -> Iterator[Step]:
        """fisher, dampen: steps add rows' importances; the adapter changes after the last."""
        groups = [[row.example for row in rows] for rows in (self.forget, self.retain)]
        found = Importances(self.model, self.adapter, groups, self.folder / STATE, json.dumps(asdict(self.spec)))

        def step(number: int) -> Step:
            loss, mine = found.losses[number - 1], number <= len(self.forget)
            return Step(number, self.total, loss if mine else None, None if mine else loss)

        yield from map(step, found.run(self.keep_every))
        self.steps = [step(number) for number in range(1, self.total + 1)]
        mine, everything = found.means()

        def put(selection: float) -> None:
            parameters = {"selection": selection, "dampening": self.spec.dampening}
            self.adapter.put(dampened(self.adapter.first, mine, everything, **parameters))

        if self.spec.method == "fisher":
            put(self.spec.selection)
            return
        threshold, ended = self._gentlest(put)
        put(threshold)
        if not ended:  # rows that are known by heart have next to no gradient, and so no importance
            self.steps[-1] = replace(self.steps[-1], stopped="no threshold ended the answers that were to be forgotten")
            yield self.steps[-1]

    def _weaken(self) -> Iterator[Step]:
        """renew: what fisher does, from the forget rows and three times as many retained, before relabel's steps."""
        groups = [[row.example for row in rows] for rows in (self.forget, self.retain[: 3 * len(self.forget)])]
        plan = json.dumps(asdict(self.spec))
        found = Importances(self.model, self.adapter, groups, self.folder / "importances.safetensors", plan)
        for done in found.run(self.keep_every):
            yield Step(done, found.total, None, None, stage="importances")
        mine, everything = found.means()
        parameters = {"selection": RENEW, "dampening": self.spec.dampening}
        self.adapter.put(dampened(self.adapter.first, mine, everything, **parameters))

    def _gentlest(self, put: Callable[[float], None]) -> tuple[float, bool]:
        """dampen: the highest threshold, so the least change, after which the forgotten answers are not begun.

        That is, by no more of the forget rows than the model without its adapter begins. The threshold is found by
        halving on a logarithmic scale; where not even 1 does it, it is 1, and the second of the pair says so.
        """
        rng = random.Random(self.spec.seed)  # noqa: S311 (no secret)
        asked = [row.example for row in rng.sample(self.forget, min(PROBE, len(self.forget)))]
        self.adapter.put({name: torch.zeros_like(weight) for name, weight in self.adapter.first.items()})
        allowed = self._begun(asked)
        put(1.0)
        if self._begun(asked) > allowed:
            return 1.0, False
        low, high = 0.0, math.log(self._most)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            put(math.exp(middle))
            low, high = (middle, high) if self._begun(asked) <= allowed else (low, middle)
        return math.exp(low), True

    def _begun(self, examples: Sequence[Example]) -> int:
        """How many responses' first tokens are what the model would write."""
        found = 0
        with torch.no_grad():
            for batch in batches(examples, BUDGET):
                logits, tokens = target_logits(self.model, [examples[at] for at in batch])
                right = (logits.argmax(1) == tokens).split([len(examples[at].positions) for at in batch])
                found += sum(bool(each[:BEGINNING].all()) for each in right)
        return found

    def save(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder."""
        self.adapter.save(folder)

    def _known(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[forget rows] twice: the losses before unlearning, and loreun's weights from them."""
        if self.spec.method not in NEEDS_KNOWN:
            return torch.ones(0), torch.ones(0)
        before = self._measured([row.example for row in self.forget])
        return before, loss_weights(before, self.spec.temperature)

    def _step(self, number: int, known: tuple[torch.Tensor, torch.Tensor]) -> Step | None:
        """One step; None where a loss is not finite, and then nothing is changed."""
        chosen, kept = (
            self._rows(len(rows), each, number, salt)
            for rows, each, salt in zip((self.forget, self.retain), self.per_step, ("forget", "retain"), strict=True)
        )
        torch.manual_seed(self.spec.seed * 1_000_003 + number)  # the dropout masks of this step
        self.model.model.train()
        parts, forget, retain = [], None, None
        if chosen:
            rows = [self.forget[at] for at in chosen]
            with torch.set_grad_enabled(self.spec.method not in ("relabel", "renew")):  # there it is only told
                each = self._losses([row.example for row in rows])
            forget = float(each.detach().mean())
            parts.append(self._forget_terms(rows, each, chosen, known))
        if kept:
            rows = [self.retain[at] for at in kept]
            each = self._losses([row.example for row in rows])
            retain = float(each.detach().mean())
            parts.append(each * self._row_weights(rows))
        loss = torch.cat(parts).mean()
        self.model.model.eval()
        if not torch.isfinite(loss):
            return None
        self.optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=list(self._weights.values()))
        nn.utils.clip_grad_norm_(self._weights.values(), self.spec.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(number)
        self.optimizer.step()
        return Step(number, self.total, forget, retain)

    def _forget_terms(
        self,
        rows: Sequence[TrainingRow],
        each: torch.Tensor,
        chosen: Sequence[int],
        known: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        spec = self.spec
        if spec.method in ("relabel", "renew"):
            return self._losses([row.clean for row in rows if row.clean is not None])
        if spec.method == "rapidun":
            return self._row_weights(rows) * weighted_ascent(self._clean(rows), each, spec.descent, spec.ascent)
        if spec.method in ("npo", "bounded"):
            tokens = torch.tensor([float(len(row.example.positions)) for row in rows], device=each.device)
            pushed = npo(each, known[0][list(chosen)], tokens, spec.beta or BETA["npo"])
            if spec.method == "npo":
                return pushed
            return self._row_weights(rows) * (spec.descent * self._clean(rows) + spec.ascent * pushed)
        if spec.method == "simnpo":
            return simnpo(each, spec.beta or BETA["simnpo"], spec.gamma)
        if spec.method == "loreun":
            return -each * known[1][list(chosen)]
        return -each  # ga, graddiff

    def _clean(self, rows: Sequence[TrainingRow]) -> torch.Tensor:
        """[rows]: the losses of their clean answers, 0 where a row has none."""
        if all(row.clean is None for row in rows):
            return torch.zeros(len(rows), device=self.model.spec.device)
        found = self._losses([row.clean or row.example for row in rows])
        return torch.where(torch.tensor([row.clean is not None for row in rows], device=found.device), found, 0.0)

    def _losses(self, examples: Sequence[Example]) -> torch.Tensor:
        return torch.stack([each.mean() for each in target_losses(self.model, examples)])

    def _row_weights(self, rows: Sequence[TrainingRow]) -> torch.Tensor:
        return torch.tensor([row.weight for row in rows], device=self.model.device)

    def _rows(self, rows: int, each: int, number: int, salt: str) -> list[int]:
        """Places of the step's rows: pass after pass, each in an order of its own."""
        found = []
        for place in range((number - 1) * each, number * each):
            epoch, at = divmod(place, rows)
            order = list(range(rows))
            random.Random(f"{self.spec.seed} {salt} {epoch}").shuffle(order)  # noqa: S311 (no secret)
            found.append(order[at])
        return found

    def _lr(self, number: int) -> float:
        """Linear warm-up, then a linear decay to 0."""
        warm = max(1, round(WARM_UP * self.total))
        share = number / warm if number <= warm else (self.total - number + 1) / (self.total - warm + 1)
        return self.spec.lr * share

    def mean_loss(self, examples: Sequence[Example]) -> float:
        """The mean over rows of their losses, by the adapter as it is now."""
        return float(self._measured(examples).mean())

    def _measured(self, examples: Sequence[Example]) -> torch.Tensor:
        """[examples]: their losses, by the adapter as it is now; no gradient is taken."""
        self.model.model.eval()
        found = torch.empty(len(examples), device=self.model.spec.device)
        with torch.no_grad():
            for batch in batches(examples, BUDGET):
                found[batch] = self._losses([examples[at] for at in batch])
        return found

    def _keep(self, number: int) -> None:
        state = {f"weight.{name}": weight for name, weight in self.adapter.copy().items()}
        for name, weight in self._weights.items():
            moments = self.optimizer.state[weight]
            state[f"first.{name}"], state[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        told = {"spec": json.dumps(asdict(self.spec)), "steps": json.dumps([asdict(step) for step in self.steps])}
        write_file(self.folder / STATE, save(plain, told))

    def _restore(self) -> int:
        """Put the last kept state back; the step it was kept after, 0 without one."""
        file = self.folder / STATE
        if not file.is_file():
            return 0
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
        if json.loads(told["spec"]) != asdict(self.spec):
            raise SpecError("the folder holds a run with other settings", field="spec")
        self.steps = [Step(**step) for step in json.loads(told["steps"])]
        state, number = load_file(file), len(self.steps)
        self.adapter.put({name: state[f"weight.{name}"] for name in self._weights})
        for name, weight in self._weights.items():
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(number)),
                "exp_avg": state[f"first.{name}"].to(weight.device),
                "exp_avg_sq": state[f"second.{name}"].to(weight.device),
            }
        return number
