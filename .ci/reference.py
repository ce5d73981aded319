"""The reference pages of the documentation, made out of the code when the documentation is built (a hook of MkDocs).

None of them is kept: what a page says is what the code says at that moment. `pages()` needs no MkDocs.
"""

import ast
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from app.problems import KINDS  # noqa: E402
from app.settings import Settings  # noqa: E402

OPENAPI: dict[str, Any] = json.loads((ROOT / "openapi/openapi.json").read_text(encoding="utf-8"))
SCHEMAS: dict[str, Any] = OPENAPI["components"]["schemas"]
UPWARDS = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")


def pages() -> dict[str, str]:
    """Each page's name under docs/ and its Markdown."""
    return {
        "reference/endpoints.md": endpoints(),
        "reference/schemas.md": schemas(),
        "reference/settings.md": settings(),
        "reference/problems.md": problems(),
    }


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: the pages join those that lie in docs/."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs: what lies in the repository but not in docs/ is named, since the built pages do not have it."""

    def named(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), found[2]))
        if not path.startswith("../"):
            return found[0]
        return found[1] if f"../{found[1]}" == path else f"{found[1]} (`{path[3:]}`)"

    return UPWARDS.sub(named, markdown)


def settings() -> str:
    """Every setting."""
    lines = [
        "# Settings",
        "",
        "Read from the environment, or from a `.env` file in the working directory. `headwater settings` prints them "
        "as this process would see them.",
        "",
        *_table("setting", "default", "what it does"),
    ]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is PydanticUndefined else _value(field.default)
        lines.append(_row(f"`HEADWATER_{name.upper()}`", default, field.description or ""))
    return _page(lines)


def problems() -> str:
    """Every problem type, with what the runbook says to do."""
    found: dict[str, set[int]] = {}
    for status, slug in [*KINDS.values(), *_refusals()]:
        found.setdefault(slug, set()).add(status)
    lines = [
        "# Problems",
        "",
        "Every error is `application/problem+json` (RFC 9457): `type`, `title`, `status`, `detail`, `errors` (the "
        "fields at fault) and `request_id`, under which the log has it. `type` is `urn:headwater:problem:` and one of "
        "these names.",
        "",
        *_table("problem", "status", "what to do"),
    ]
    runbook = _runbook()
    return _page(
        lines
        + [
            _row(f"`{slug}`", ", ".join(map(str, sorted(statuses))), runbook.get(slug, ""))
            for slug, statuses in sorted(found.items())
        ]
    )


def endpoints() -> str:
    """Every operation by tag: what it does, the scope it needs, what goes in and out."""
    lines = [
        "# Endpoints",
        "",
        "The whole of it, with examples that can be sent, is the Swagger UI of your own service (`/docs`); "
        "`openapi/openapi.json` is the document. A scope is needed where the service wants API keys.",
        "",
    ]
    by_tag: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, operations in OPENAPI["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault((operation.get("tags") or ["other"])[0], []).append((method, path, operation))
    for tag, found in by_tag.items():
        lines += [f"## {tag.capitalize()}", ""]
        for method, path, operation in found:
            scopes = [scope for one in operation.get("security", []) for scope in next(iter(one.values()))]
            lines += [
                f"### `{method.upper()} {path}`",
                "",
                operation.get("description", operation["summary"]).strip(),
                "",
            ]
            body = ", ".join(_content(operation.get("requestBody", {})))
            answers = [
                f"{status} {', '.join(_content(answer)) or answer['description']}"
                for status, answer in operation["responses"].items()
                if status < "400"
            ]
            refused = ", ".join(status for status in sorted(operation["responses"]) if status >= "400")
            facts = [
                ("needs", f"`{scopes[0]}`" if scopes else "nothing"),
                ("takes", body),
                ("answers", "; ".join(answers)),
                ("refuses with", refused),
            ]
            lines += [*(f"- **{name}** {value}" for name, value in facts if value), ""]
            parameters = operation.get("parameters", [])
            if parameters:
                lines += _table("parameter", "in", "what it is")
                lines += [_row(f"`{one['name']}`", one["in"], one.get("description", "")) for one in parameters]
                lines.append("")
    return _page(lines)


def schemas() -> str:
    """Every body that goes in or comes out, field by field."""
    lines = [
        "# Bodies",
        "",
        "What requests carry and answers hold, by the names that [endpoints](endpoints.md) use.",
        "",
    ]
    for name, schema in SCHEMAS.items():
        lines += [f"## {name}", "", schema.get("description", "").strip(), ""]
        if "enum" in schema:
            lines += [", ".join(f"`{one}`" for one in schema["enum"]), ""]
        if schema.get("properties"):
            needed = schema.get("required", [])
            lines += _table("field", "type", "default", "what it is")
            for field, raw in schema["properties"].items():
                default = "required" if field in needed else _value(raw.get("default"))
                lines.append(_row(f"`{field}`", _type(raw), default, raw.get("description", "")))
            lines.append("")
    return _page(lines)


def _refusals() -> Iterator[tuple[int, str]]:
    """What the code refuses by name: `Refusal(status, slug, ...)` and `make(status, slug, ...)`."""
    for source in sorted((ROOT / "app").rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Refusal", "make") and len(node.args) > 1:
                status, slug = node.args[:2]
                if isinstance(status, ast.Constant) and isinstance(slug, ast.Constant):
                    yield status.value, slug.value


def _runbook() -> dict[str, str]:
    """What to do about each problem, out of the runbook in operations.md."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    found = {}
    for names, what in re.findall(r"^\| (`[^|]+) \| [0-9, ]+ \| (.+) \|$", text, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`([\w-]+)`", names), what)
    return found


def _content(holder: dict[str, Any]) -> Iterator[str]:
    """The bodies of a request or an answer."""
    for kind, one in holder.get("content", {}).items():
        told = _type(one.get("schema", {}))
        yield told if kind in ("application/json", "application/problem+json") else f"`{kind}`"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](schemas.md#{name.lower()})"
    for many in ("anyOf", "oneOf", "allOf"):
        if many in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[many]))
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if schema.get("type") == "array":
        items = schema.get("items") or {}
        return f"list of {_type(items)}" if items else "list"
    return str(schema.get("type", "anything"))


def _value(value: Any) -> str:
    if value is None or value == "" or value == ():
        return ""
    return f"`{value}`" if isinstance(value, str | Path) else f"`{json.dumps(value)}`"


def _table(*columns: str) -> list[str]:
    return [_row(*columns), "|" + " --- |" * len(columns)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _page(lines: list[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"
