"""The report as one HTML page that needs nothing else: no script, no font, no request.

The page is made of the JSON report alone. Data are hostile: every text is escaped, and the page's
own policy forbids whatever is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from outcrop.data.report import gravest_first
from outcrop.data.report_charts import histogram, named_bars

MAX_ROWS = 1000
"""Defects in the table; the JSON report lists as many as the check does."""
_MAX_BARS = 16
_COLOURS = {
    "reject": "reject",
    "drop": "drop",
    "repair": "repair",
    "review": "review",
    "skip": "advice",
    "advice": "advice",
}
_VERDICTS = {
    "rejected": "A job with these data fails.",
    "warnings": "A job trains on these data as they stand. Look at what was found first.",
    "clean": "Nothing was found.",
}
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#16191d;--dim:#5b6470;--line:#dfe3e8;
--card:#f6f7f9;--bar:#2f6fb5;--reject:#c0322b;--drop:#b5651d;--repair:#2f6fb5;--review:#7a5ba8;
--advice:#6b7682}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e7eaee;--dim:#9aa4b0;
--line:#30363d;--card:#1c2127;--bar:#6aa5e6;--reject:#f0736a;--drop:#e0a060;--repair:#6aa5e6;
--review:#b597e0;--advice:#98a3af}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 24px 60px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:24px;margin:0 0 2px}h2{font-size:17px;margin:34px 0 10px}
h3{font-size:14px;margin:0 0 6px;font-weight:600}p{margin:4px 0}.dim{color:var(--dim)}
.verdict{display:inline-block;padding:3px 12px;border-radius:14px;color:#fff;font-weight:600}
.verdict.rejected{background:#b02a24}.verdict.warnings{background:#8f5013}
.verdict.clean{background:#216e39}
.rejection{border-left:4px solid var(--reject);background:var(--card);padding:10px 14px;
margin:14px 0;white-space:pre-wrap;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;
margin-top:16px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.card b{display:block;font-size:22px;line-height:1.3;font-variant-numeric:tabular-nums}
.charts{columns:2 440px;column-gap:16px}
.chart{border:1px solid var(--line);border-radius:8px;padding:12px 14px;margin:0 0 16px;
break-inside:avoid}
svg{display:block;width:100%;height:auto}svg text{fill:var(--dim);font-size:11.5px}
.grid{stroke:var(--line)}.bar{fill:var(--bar)}.mark{stroke:var(--reject);stroke-dasharray:4 3}
.reject{fill:var(--reject);color:var(--reject)}.drop{fill:var(--drop);color:var(--drop)}
.repair{fill:var(--repair);color:var(--repair)}.review{fill:var(--review);color:var(--review)}
.advice{fill:var(--advice);color:var(--advice)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;vertical-align:top;padding:6px 10px;border-bottom:1px solid var(--line)}
th{color:var(--dim);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
code.key{white-space:nowrap}.where{display:block;min-width:150px}
"""


def write_page(report: Mapping[str, Any]) -> bytes:
    """Return the page of a report, UTF-8."""
    body = "".join(
        [
            _head(report),
            _cards(report),
            _charts(report),
            _codes(report),
            _files(report),
            _defects(report),
        ]
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data report: {escape(report['verdict'])}</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )
    return page.encode(errors="replace")


def _head(report: Mapping[str, Any]) -> str:
    names = ", ".join(f"<code>{escape(file['name'])}</code>" for file in report["files"])
    model = report["model"]
    whose = (
        "for any model"
        if model is None
        else f"for <code>{escape(model['id'])}</code>"
        + (f" ({escape(model['name'])})" if model["name"] else "")
    )
    verdict = escape(report["verdict"])
    text = (
        f'<h1>Data report</h1><p class="dim">{names}</p>'
        f'<p class="dim">{whose}, {escape(report["customizationType"])}, batch size '
        f"{report['batchSize']:,}</p>"
        f'<p><span class="verdict {verdict}">{verdict}</span> {_VERDICTS[report["verdict"]]}</p>'
    )
    if report["rejection"]:
        text += f'<div class="rejection">{escape(report["rejection"])}</div>'
    return text


def _cards(report: Mapping[str, Any]) -> str:
    cards = [("records", sum(file["numRecords"] for file in report["files"]))]
    cards.append(("usable", sum(file["numUsable"] for file in report["files"])))
    tokens, training = report["tokens"], report["training"]
    if tokens is not None:
        cards.append(("tokens an epoch", tokens["perEpoch"]))
        cards.append(("tokens a record, at most", tokens["total"]["maximum"]))
    duplicates = report["duplicates"]
    cards += [
        ("exact duplicates", duplicates["exact"]),
        ("near duplicates", duplicates["near"]),
        ("conflicting labels", duplicates["conflictingLabels"]),
    ]
    shown = [(name, f"{count:,}") for name, count in cards]
    if training is not None:
        shown.append((f"epochs, {training['numTokens']:,} tokens", f"{training['numEpochs']:,}"))
        if training["seconds"] is not None:
            speed = f"estimated training, at {training['tokensPerSecond']:,.0f} tokens/s"
            shown.append((speed, _duration(training["seconds"])))
    return '<div class="cards">' + "".join(_card(*card) for card in shown) + "</div>"


def _card(name: str, value: str) -> str:
    return f'<div class="card"><b>{escape(value)}</b><span class="dim">{escape(name)}</span></div>'


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _charts(report: Mapping[str, Any]) -> str:
    charts = []
    tokens = report["tokens"]
    if tokens is not None:
        names = {"total": "Whole records", "input": "Prompts", "output": "Completions"}
        for key, name in names.items():
            if tokens[key] is not None:
                marks = {"limit": tokens["limit"]} if key == "total" else {}
                charts.append(_lengths_chart(f"{name}, tokens", tokens[key], "tokens", marks))
    elif report["characters"] is not None:
        found = report["characters"]
        charts.append(_lengths_chart("Records, characters", found, "characters", {}))
    bars = [
        (f"{row['code']} ({severity})", count, _COLOURS[severity])
        for row in report["codes"]
        for severity, count in row["counts"].items()
    ]
    charts.append(_bars_chart("Defects by kind", bars))
    duplicates = report["duplicates"]
    if any(duplicates.values()):
        rows = [
            ("exact duplicates", duplicates["exact"], "drop"),
            ("near duplicates", duplicates["near"], "drop"),
            ("conflicting labels", duplicates["conflictingLabels"], "review"),
        ]
        charts.append(_bars_chart("Duplicates", rows))
    if report["labels"] is not None:
        rows = [(label, count, "bar") for label, count in report["labels"]["counts"].items()]
        charts.append(_bars_chart(f"Labels ({report['labels']['numLabels']:,})", rows))
    if report["languages"]:
        rows = [(name, count, "bar") for name, count in report["languages"].items()]
        charts.append(_bars_chart("Languages of a sample", rows))
    return '<h2>At a glance</h2><div class="charts">' + "".join(charts) + "</div>"


def _lengths_chart(
    title: str, found: Mapping[str, Any], unit: str, marks: Mapping[str, int]
) -> str:
    picture = histogram(
        title, found["histogram"]["edges"], found["histogram"]["counts"], unit, marks
    )
    figures = (
        f"{found['total']:,} in all; from {found['minimum']:,} to {found['maximum']:,}; half of "
        f"them up to {found['median']:,}, 95 % up to {found['percentile95']:,}"
    )
    return _chart(title, f'{picture}<p class="dim">{figures}</p>')


def _bars_chart(title: str, rows: list[tuple[str, int, str]]) -> str:
    if not rows:
        return _chart(title, '<p class="dim">none</p>')
    left = rows[_MAX_BARS:]
    text = named_bars(title, rows[:_MAX_BARS])
    if left:
        rest = sum(count for _, count, _ in left)
        text += f'<p class="dim">and {len(left):,} more, {rest:,} in all</p>'
    return _chart(title, text)


def _chart(title: str, content: str) -> str:
    return f'<div class="chart"><h3>{escape(title)}</h3>{content}</div>'


def _codes(report: Mapping[str, Any]) -> str:
    if not report["codes"]:
        return ""
    rows = [
        (
            _severity(severity),
            f'<code class="key">{escape(row["code"])}</code>',
            _number(count),
            escape(row["summary"]),
            escape(row["remedy"]),
        )
        for row in report["codes"]
        for severity, count in row["counts"].items()
    ]
    header = ("severity", "code", "#found", "what it is", "what to do")
    return "<h2>What was found</h2>" + _table(header, rows)


def _files(report: Mapping[str, Any]) -> str:
    rows = []
    for file in report["files"]:
        made_from = f" (cleaned from {file['madeFrom']})" if file["madeFrom"] else ""
        rows.append(
            (
                escape(file["role"]),
                f"<code>{escape(file['name'])}</code>{escape(made_from)}",
                escape(file["format"] or "none known"),
                _number(file["numRecords"]),
                _number(file["numUsable"]),
                _number(file["numBytes"]),
                f"<code>{escape(file['sha256'])}</code>",
            )
        )
    header = ("role", "file", "format", "#records", "#usable", "#bytes", "SHA-256")
    return "<h2>Files</h2>" + _table(header, rows)


def _defects(report: Mapping[str, Any]) -> str:
    defects = report["defects"]
    if not defects:
        return ""
    num_defects = sum(report["counts"].values())
    rows = [
        (
            _severity(defect["severity"]),
            f'<code class="key">{escape(defect["code"])}</code>',
            f'<code class="where">{escape(_where(defect))}</code>',
            escape(defect["message"]) + _twin(defect),
            f"<code>{escape(defect['value'])}</code>",
        )
        for defect in gravest_first(defects)[:MAX_ROWS]
    ]
    note = ""
    if len(rows) < num_defects:
        note = (
            f'<p class="dim">{len(rows):,} of {num_defects:,} are listed: at most '
            f"{report['defectsListedForEachCode']:,} of a code.</p>"
        )
    header = ("severity", "code", "where", "what is wrong", "value")
    return f"<h2>Each defect</h2>{note}{_table(header, rows)}"


def _where(place: Mapping[str, Any]) -> str:
    return str(place["file"]) if place["line"] is None else f"{place['file']}:{place['line']}"


def _twin(defect: Mapping[str, Any]) -> str:
    if defect["twin"] is None:
        return ""
    return f' <span class="dim">twin: <code>{escape(_where(defect["twin"]))}</code></span>'


def _severity(name: str) -> str:
    return f'<span class="{_COLOURS[name]}">{escape(name)}</span>'


def _number(count: int) -> str:
    return f"{count:,}"


def _table(header: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table of HTML cells; a column whose name begins with # has numbers."""
    names = list(header)
    classes = [' class="n"' if name.startswith("#") else "" for name in names]
    head = "".join(
        f"<th{kind}>{escape(name.lstrip('#'))}</th>"
        for kind, name in zip(classes, names, strict=True)
    )
    lines = [
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, row, strict=True))
        + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
