"""The report for people: one page that asks nothing of anybody, in light and in dark.

It has no script, and one style sheet inside it whose hash `POLICY` names, so that it can be served, or opened from a
disk, under the strictest content security policy.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from typing import Any

from app.unlearning.plots import Bar, bars, lines

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--dim:#5b6675;--rule:#d5dae1;--page:#fff;
--before:#8a94a3;--after:#1f6fb5;--oracle:#2f8f5b;--forget:#c2571a}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--dim:#9aa5b4;--rule:#39424f;--page:#14181e;
--before:#7c8796;--after:#5aa9ea;--oracle:#5cc48b;--forget:#ee8d50}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:64rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.3rem .6rem .3rem 0;
border-bottom:1px solid var(--rule)}td.number{font-variant-numeric:tabular-nums;white-space:nowrap}
.told{color:var(--dim);font-size:.85rem;font-weight:normal;display:block}
.plots{display:flex;flex-wrap:wrap;gap:1rem}figure{flex:1 1 26rem;margin:0}figcaption{font-weight:600}
svg{width:100%;height:auto}svg text{fill:var(--dim);font-size:11px}
.grid{stroke:var(--rule);fill:none}.ends{stroke:var(--ink);fill:none}.line{fill:none;stroke-width:2}
.bar.before{fill:var(--before)}.bar.after,.bar.retain{fill:var(--after)}.bar.oracle{fill:var(--oracle)}
.bar.forget{fill:var(--forget)}.line.before{stroke:var(--before)}.line.after,.line.retain{stroke:var(--after)}
.line.oracle{stroke:var(--oracle)}.line.forget{stroke:var(--forget)}
pre{overflow:auto;font-size:.85rem}
"""
POLICY = f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
"""The content security policy under which the page works."""
SHARES = {
    "attack_success_seen": "attack, seen",
    "attack_success_unseen": "attack, unseen",
    "utility": "utility",
    "membership_auc": "membership AUC",
}
LOSSES = {"forget_loss": "forget", "retain_loss": "retain", "heldout_loss": "held-out"}
STATES = ("before", "after", "oracle")


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    measures, training, attack = report["measures"], report["training"], report["relearning"]
    curves = {
        name: [(step[0], step[at]) for step in training["curve"] if step[at] is not None]
        for at, name in ((1, "forget"), (2, "retain"))
    }
    back = {name: [(one["step"], one["loss"]) for one in curve] for name, curve in attack["curves"].items()}
    plots = [
        bars("Attack, utility and membership", _groups(measures, SHARES)),
        bars("Loss, nats a token", _groups(measures, LOSSES)),
        lines("Training: loss of each step's rows", {name: curve for name, curve in curves.items() if curve}),
        lines("Relearning: loss of the forgotten rows that it does not train on", back),
    ]
    policy = html.escape(POLICY, quote=True)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Unlearning report</title><style>{STYLE}</style></head><body>
<h1>Unlearning by {html.escape(report["method"])}</h1>
<p>{_summary(report)}</p>
<div class="plots">{"".join(plots)}</div>
<h2>Before and after</h2>
<table><thead><tr><th>measure</th><th>before</th><th>after</th><th>oracle</th><th>change</th></tr></thead>
<tbody>{"".join(_row(name, states, report["definitions"][name]) for name, states in measures.items())}</tbody></table>
{"".join(f'<p class="told">{html.escape(note)}</p>' for note in report["notes"])}
<h2>Relearning</h2>
<p>{_relearning(attack)} <span class="told">{html.escape(report["definitions"]["relearning"])}</span></p>
<h2>Time</h2>
<table><tbody>{
        "".join(
            f'<tr><th>{stage}</th><td class="number">{seconds:.1f} s</td></tr>'
            for stage, seconds in report["seconds"].items()
        )
    }</tbody></table>
<h2>Rows, influence and settings</h2>
<pre>{html.escape(json.dumps({k: report[k] for k in ("rows", "influence", "settings")}, indent=1))}</pre>
</body></html>
"""


def _groups(measures: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, list[Bar]]:
    found = {
        shown: [
            Bar(state, one["value"], one["low"], one["high"])
            for state in STATES
            if (one := measures[name].get(state)) is not None
        ]
        for name, shown in names.items()
    }
    return {name: group for name, group in found.items() if group}


def _row(name: str, states: Mapping[str, Any], definition: str) -> str:
    cells = "".join(f'<td class="number">{_estimate(states.get(state))}</td>' for state in (*STATES, "change"))
    told = f'<span class="told">{html.escape(definition)}</span>'
    return f"<tr><th>{html.escape(name.replace('_', ' '))}{told}</th>{cells}</tr>"


def _estimate(one: Mapping[str, float] | None) -> str:
    if one is None:
        return ""
    return f'{one["value"]:.3g} <span class="told">{one["low"]:.3g} to {one["high"]:.3g}, n = {one["rows"]}</span>'


def _summary(report: Mapping[str, Any]) -> str:
    rows, training = report["rows"], report["training"]
    ended = f"Training stopped early: {training['stopped']}." if training["stopped"] else "Training ran to its end."
    return html.escape(
        f"{rows['forget']} rows to forget, {rows['retain']} to retain; {training['steps']} of {training['total']} "
        f"steps. {ended}"
    )


def _relearning(attack: Mapping[str, Any]) -> str:
    if not attack["curves"]:
        return "No attack was made."
    if attack["way_back"] is None:
        return f"{attack['rows']} rows: the others' loss had not risen, so there was nothing to bring back."
    half = attack["half_way_step"]
    when = "half of the rise was never gone" if half is None else f"half of the rise was gone after step {half}"
    return f"{attack['rows']} rows: {attack['way_back']:.0%} of the others' rise in loss was gone at the end; {when}."
