"""Influence: which training samples made the model say this."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TypeVar

from fastapi import APIRouter, Request

from app.api.callers import Asking, Caller
from app.api.documents import problems
from app.api.gather import Target
from app.api.schemas.filters import parse
from app.api.schemas.influence import (
    BatchItem,
    DefinitionOut,
    HitOut,
    InfluenceBatchIn,
    InfluenceBatchOut,
    InfluenceIn,
    InfluenceOut,
    OptionsIn,
    QueryIn,
    RecallOut,
    TokenOut,
    TrainTokenOut,
)
from app.api.services import Services, Use
from app.catalog.errors import CatalogError, Conflict
from app.catalog.filters import Condition
from app.catalog.tables import IndexRow, Sample
from app.influence.corpus import Message, Row, row_from_json
from app.influence.errors import HeadwaterError, QueryError
from app.influence.retrieval import Answer, Hit, Options, Query
from app.jobs.noting import Noting
from app.jobs.specs import model_from_json
from app.problems import Refusal, problem_of

router = APIRouter(prefix="/influence", tags=["influence"])
Result = TypeVar("Result")


@router.post("", responses=problems(404, 409, 413, 503))
async def query_influence(body: InfluenceIn, services: Use, caller: Asking, request: Request) -> InfluenceOut:
    """Which training samples made the model say this?

    Answers with the generation token by token, and the training samples that pushed the model towards it (proponents)
    or away from it (opponents). Calls that arrive together share one forward and backward pass.
    """
    return await _unless_hung_up(request, answer(body, services, caller))


@router.post("/batch", responses=problems(404, 409, 413, 503))
async def query_influence_batch(
    body: InfluenceBatchIn, services: Use, caller: Asking, request: Request
) -> InfluenceBatchOut:
    """Many generations in one call. Each gets an answer or a problem of its own."""
    most = min(services.settings.max_batch_queries, services.settings.influence_queue)
    if len(body.queries) > most:
        raise Refusal(422, "invalid-request", f"one call may carry at most {most} queries", field="queries")
    conditions, options = parse(body.filter), _options(body, services)
    index, target = await _target(body.index, services)
    options = await _among(conditions, index, options, services)
    services.gatherer.require_room(len(body.queries))

    async def item(place: int, query: QueryIn) -> BatchItem:
        try:
            return BatchItem(answer=await _ask(query, index, target, conditions, options, services, caller))
        except (HeadwaterError, CatalogError, Refusal) as error:
            problem, _ = problem_of(error)
            for one in problem.errors:
                one.field = f"queries.{place}.{one.field}"
            return BatchItem(problem=problem)

    async def all_items() -> InfluenceBatchOut:
        return InfluenceBatchOut(items=await asyncio.gather(*(item(*one) for one in enumerate(body.queries))))

    return await _unless_hung_up(request, all_items())


async def answer(body: InfluenceIn, services: Services, caller: Caller) -> InfluenceOut:
    """The answer to one query."""
    conditions, options = parse(body.filter), _options(body, services)
    index, target = await _target(body.index, services)
    options = await _among(conditions, index, options, services)
    return await _ask(body, index, target, conditions, options, services, caller)


def _options(body: OptionsIn, services: Services) -> Options:
    if body.top_k > services.settings.max_top_k:
        raise Refusal(422, "invalid-request", f"top_k may be at most {services.settings.max_top_k}", field="top_k")
    most = services.settings.max_token_rows
    if body.tokens != "none" and body.top_k > most:
        detail = f'with token scores top_k may be at most {most}: ask for {most} or fewer, or send "tokens": "none"'
        raise Refusal(422, "invalid-request", detail, field="top_k")
    if body.rerank != "none":
        most = services.settings.max_candidates
        if body.candidates > most:
            raise Refusal(422, "invalid-request", f"candidates may be at most {most}", field="candidates")
        if body.candidates < body.top_k:
            detail = f"candidates ({body.candidates}) must be at least top_k ({body.top_k})"
            raise Refusal(422, "invalid-request", detail, field="candidates")
    return Options(
        top_k=body.top_k,
        tokens=body.tokens,
        direction=body.direction,
        normalize=body.normalize,
        rerank=body.rerank,
        candidates=body.candidates,
    )


async def _among(conditions: Sequence[Condition], index: IndexRow, options: Options, services: Services) -> Options:
    """The options, with the rows whose metadata meet the conditions."""
    if not conditions:
        return options
    async with services.database.catalog() as catalog:
        return replace(options, among=await catalog.datasets.matching(index.id, conditions))


async def _target(ref: str, services: Services) -> tuple[IndexRow, Target]:
    """The index to ask and its model, both ready in memory, known to belong together."""
    async with services.database.catalog() as catalog:
        index = await catalog.indexes.ready(ref)
    model = await services.compute.model(model_from_json(index.model.spec))
    async with services.noticing_damage(index.id):
        opened = await services.compute.index(services.settings.indexes_dir / index.id, index.version)
    opened.check(model)
    loop = asyncio.get_running_loop()

    def fetch(row_ids: Sequence[str]) -> dict[str, Row]:
        # called in the torch thread, which may wait for the loop; never the other way round
        found = asyncio.run_coroutine_threadsafe(_samples(services, index, row_ids), loop).result()
        return {row_id: row_from_json(sample.record) for row_id, sample in found.items()}

    noted = Noting(opened, fetch)
    return index, Target(model, noted, noted.row_of, (index.id, index.version))


async def _ask(
    body: QueryIn,
    index: IndexRow,
    target: Target,
    conditions: Sequence[Condition],
    options: Options,
    services: Services,
    caller: Caller,
) -> InfluenceOut:
    began = time.perf_counter()
    messages = _messages(body)
    texts = [*(message.content for message in messages), body.generation or ""]
    _require_short(texts, services)
    if "tokens" in caller.quotas:  # before they cost anything, and as many as it may come to
        read = await asyncio.to_thread(target.model.count_tokens, texts)
        written = body.max_new_tokens if body.generation is None else 0
        await services.quotas.take("tokens", caller, read + written)
    generation = body.generation
    if generation is None:
        generation = await _generate(target, messages, body.max_new_tokens, services)
    query = Query(messages=messages, generation=generation, span=body.span)  # a bad one fails nobody but itself
    asked = time.perf_counter()
    answer = await services.gatherer.ask(target, query, options)
    answered = time.perf_counter()
    hits = [hit.id for hit in (*answer.proponents, *answer.opponents)]
    samples = await _samples(services, index, hits, conditions)
    timings = {
        **answer.timings,
        "generate": asked - began,
        "wait": max(answered - asked - sum(answer.timings.values()), 0.0),
        "total": time.perf_counter() - began,
    }
    services.metrics.note_stages(timings)
    return _answer(index.id, body, generation, answer, samples, timings)


async def _samples(
    services: Services, index: IndexRow, row_ids: Sequence[str], conditions: Sequence[Condition] = ()
) -> dict[str, Sample]:
    """The rows of an answer; the index may have been deleted since it was asked."""
    async with services.database.catalog() as catalog:
        found = await catalog.datasets.of_index(index.id, row_ids, conditions)
    if not found.keys() >= set(row_ids):
        raise Conflict(f"index {index.name!r} was deleted while it was asked", field="index")
    return found


def _messages(body: QueryIn) -> tuple[Message, ...]:
    if body.messages is not None:
        return tuple(Message(role=message.role, content=message.content) for message in body.messages)
    return (Message(role="user", content=body.prompt),) if body.prompt else ()


async def _generate(target: Target, messages: Sequence[Message], tokens: int, services: Services) -> str:
    if tokens > services.settings.max_new_tokens:
        most = services.settings.max_new_tokens
        raise Refusal(422, "invalid-request", f"max_new_tokens may be at most {most}", field="max_new_tokens")
    template = target.index.manifest.index_spec.template
    write = partial(target.model.generate, messages, max_new_tokens=tokens, template=template)
    written = await services.gatherer.prepare(write)
    if not written.strip():
        raise QueryError("the model wrote nothing for this prompt: send the generation", field="generation")
    return written


def _require_short(texts: Sequence[str], services: Services) -> None:
    size, most = sum(map(len, texts)), services.settings.max_query_chars
    if size > most:
        detail = f"prompt and generation have {size:,} characters; at most {most:,} are read"
        raise Refusal(413, "too-large", detail, field="generation")


def _answer(
    index_id: str,
    body: QueryIn,
    generation: str,
    answer: Answer,
    samples: dict[str, Sample],
    timings: dict[str, float],
) -> InfluenceOut:
    def show(hits: Sequence[Hit]) -> list[HitOut]:
        return [_hit(hit, samples[hit.id]) for hit in hits]

    return InfluenceOut(
        index=index_id,
        generation=generation,
        generated=body.generation is None,
        loss=answer.loss,
        tokens=[TokenOut(**asdict(token)) for token in answer.tokens],
        proponents=show(answer.proponents),
        opponents=show(answer.opponents),
        definition=DefinitionOut.model_validate(answer.definition, from_attributes=True),
        warnings=list(answer.warnings),
        timings={part: round(seconds, 6) for part, seconds in timings.items()},
    )


def _hit(hit: Hit, sample: Sample) -> HitOut:
    row = row_from_json(sample.record)
    return HitOut(
        id=hit.id,
        prompt=row.prompt,
        response=row.response,
        metadata=sample.extra,
        score=hit.score,
        percentile=hit.percentile,
        recall=None if hit.recall is None else RecallOut(score=hit.recall.score, rank=hit.recall.rank),
        token_scores=hit.token_scores,
        train_tokens=None if hit.train_tokens is None else [TrainTokenOut(**asdict(one)) for one in hit.train_tokens],
        pair_scores=hit.pair_scores,
    )


async def _unless_hung_up(request: Request, work: Awaitable[Result]) -> Result:
    """Do the work, but drop it when the client goes away: its place in the queue is worth more to others."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(499, "client-closed-request", "the client hung up")
        return working.result()
    finally:
        gone.cancel()
        working.cancel()


async def _hang_up(receive: Callable[[], Awaitable[object]]) -> None:
    while True:
        message = await receive()
        if isinstance(message, dict) and message["type"] == "http.disconnect":
            return
