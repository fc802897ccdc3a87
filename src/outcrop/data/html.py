"""Tell HTML from what only looks like it, and turn HTML into the text that it shows.

`a < b`, `List<int>`, `<context>` and other mark-up of people's own are no HTML and stay as they
are; so does what stands in a Markdown code span or block. What is HTML is read as a browser reads
it (selectolax); scripts, styles and comments show nothing, blocks begin a new line.

Source: HTML living standard, sections 4 (elements) and 13.5 (named character references).
"""

from __future__ import annotations

import html
import html.entities
import re
from bisect import bisect_right
from typing import Any

from selectolax.lexbor import LexborHTMLParser


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


_BLOCKS = _set(
    "address article aside audio blockquote br caption center dd details dialog div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr important legend li main menu nav "
    "note ol optgroup option p pre section select summary table tbody textarea tfoot thead title "
    "tr ul video"
)
_INLINE = _set(
    "a abbr acronym area b base bdi bdo big body button canvas cite code col colgroup del dfn em "
    "embed font head html i iframe img ins kbd label link map mark meta nobr noscript q samp "
    "script small span strike strong style sub sup svg td th tt u var wbr"
)
_OWN_USE = _set(
    "address area article audio base body button canvas caption code details dialog embed figure "
    "footer form head header label legend link main map mark menu meta nav note important option q "
    "section select summary title var video"
)
"""Names that people also give to mark-up of their own, such as `<summary>` in a prompt: HTML only
where an attribute stands in it, or where the text has other HTML. `<s>` is Llama's and never HTML;
`object`, `data`, `input`, `output`, `source`, `time` and `template` are too common to tell."""
_NAMES = _BLOCKS | _INLINE
_UNCLOSED = _set("br hr img wbr p li dt dd td th tr html")
"""What stands alone, or may be left open."""
_SILENT = _set("script style head noscript iframe template svg")
_CELLS = _set("td th")

_TAG = re.compile(
    r"<(?P<close>/?)(?P<name>[A-Za-z][A-Za-z0-9-]*)(?P<rest>(?:\s[^<>]*)?)(?P<void>/?)>"
)
_COMMENT_START = re.compile("<!--")
_DOCTYPE = re.compile(r"<!DOCTYPE\b[^<>]*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`)", re.DOTALL)
_ATTRIBUTE = re.compile(r"\s+[A-Za-z_:@][\w:.-]*\s*=")
_MAX_ROUNDS = 16


def find_html(text: str) -> tuple[int, int] | None:
    """Return where the first HTML tag, comment or entity of a text begins and ends, or None."""
    if "<" not in text and "&" not in text:
        return None
    code = _code_spans(text)
    spans = [tag.span() for tag in _real_tags(text, code)] + _comments(text, code)
    entity = next(
        (
            found
            for found in _ENTITY.finditer(text)
            if _is_entity(found[0]) and not _in(code, found)
        ),
        None,
    )
    return min([*spans, entity.span()] if entity else spans, default=None)


def remove_html(text: str) -> str:
    """Return what a text shows: without tags and comments, with entities as characters.

    Where nothing in it is HTML, it comes back as it is. Done to the end: what an entity spelled is
    looked at again, so the result has no HTML.
    """
    if "<" not in text and "&" not in text:
        return text
    for number in range(_MAX_ROUNDS):
        code = _code_spans(text)
        tags = _real_tags(text, code, own_names=number == 0)
        comments = _comments(text, code)
        if tags or comments:
            shown = _shown(text, code, [tag.span() for tag in tags], comments)
        else:
            shown = _decoded(text, code)
        if len(shown) >= len(text):
            return _decoded(text, code)
        text = shown
    return text


def _code_spans(text: str) -> list[tuple[int, int]]:
    return [found.span() for found in _CODE.finditer(text)] if "`" in text or "~~~" in text else []


def _in(spans: list[tuple[int, int]], found: re.Match[str]) -> bool:
    place = bisect_right(spans, (found.start(), len(found.string) + 1)) - 1
    return place >= 0 and found.start() < spans[place][1]


def _comments(text: str, code: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return where comments are; one that does not end is none, and is looked for once."""
    if "<!" not in text:
        return []
    found = [each.span() for each in _DOCTYPE.finditer(text) if not _in(code, each)]
    place = 0
    for start in _COMMENT_START.finditer(text):
        if start.start() < place or _in(code, start):
            continue
        end = text.find("-->", start.end())
        if end < 0:
            break
        place = end + 3
        found.append((start.start(), place))
    return sorted(found)


def _real_tags(
    text: str, code: list[tuple[int, int]], *, own_names: bool = True
) -> list[re.Match[str]]:
    """Return the tags that are HTML.

    Args:
        own_names: whether tags of unknown names, opened and closed, count as well beside real ones.
    """
    if "<" not in text:
        return []
    found = [tag for tag in _TAG.finditer(text) if not _in(code, tag)]
    opened = {tag["name"].lower() for tag in found if not tag["close"]}
    closed = {tag["name"].lower() for tag in found if tag["close"]}
    sure = [tag for tag in found if _is_sure(tag, text, opened, closed)]
    if not sure:
        return []
    paired = opened & closed
    return [
        tag
        for tag in found
        if (
            (name := tag["name"].lower()) in _NAMES
            and (name in _OWN_USE | _UNCLOSED or _is_sure(tag, text, opened, closed))
        )
        or (own_names and name in paired and name != "s" and name == tag["name"])
    ]


def _is_sure(tag: re.Match[str], text: str, opened: set[str], closed: set[str]) -> bool:
    name = tag["name"].lower()
    if name not in _NAMES:
        return False
    if tag["name"] not in (name, name.upper()):  # XML likes names such as <Code>
        return False
    if tag["rest"].strip(" /\t\n") and not _ATTRIBUTE.match(tag["rest"]):
        return False
    if name in _OWN_USE:
        return bool(_ATTRIBUTE.match(tag["rest"]))
    if tag["close"]:
        return True
    if name in closed or _ATTRIBUTE.match(tag["rest"]):
        return True
    if name not in _UNCLOSED:
        return False
    before = text[tag.start() - 1 : tag.start()]
    # `vector<li>` is somebody's type, `line<br>` is a line end.
    return name in ("br", "hr", "img", "wbr") or not (before.isalnum() or before == "_")


def _shown(
    text: str,
    code: list[tuple[int, int]],
    tags: list[tuple[int, int]],
    comments: list[tuple[int, int]],
) -> str:
    """Return what a browser shows of a text in which only these tags are tags."""
    parts: list[str] = []
    is_code = set(code)
    place = 0
    for start, end in sorted([*tags, *comments, *code]):
        if start < place:
            continue
        parts.append(_escaped(text[place:start]))
        if (start, end) in is_code:
            parts.append(text[start:end].replace("&", "&amp;").replace("<", "&lt;"))
        elif text[start + 1] != "!":
            parts.append(text[start:end])
        place = end
    parts.append(_escaped(text[place:]))
    # A parser leaves out the white space that a page begins with; before a completion it counts.
    lead = text[: len(text) - len(text.lstrip())]
    return lead + html_text("".join(parts).replace("\r", "&#13;").lstrip())


def _escaped(text: str) -> str:
    """Write what is no mark-up so that a parser takes it for text; real entities stay."""
    text = re.sub(r"&", lambda found: "&" if _entity_at(text, found.start()) else "&amp;", text)
    return text.replace("<", "&lt;")


def _entity_at(text: str, place: int) -> bool:
    found = _ENTITY.match(text, place)
    return found is not None and _is_entity(found[0])


def _is_entity(spelled: str) -> bool:
    if spelled[1] == "#":
        return html.unescape(spelled) not in ("", "\ufffd", spelled)
    return spelled[1:] in html.entities.html5


def _decoded(text: str, code: list[tuple[int, int]]) -> str:
    def character(found: re.Match[str]) -> str:
        is_one = _is_entity(found[0]) and not _in(code, found)
        return html.unescape(found[0]) if is_one else found[0]

    return _ENTITY.sub(character, text)


def html_text(markup: str, *, headings: bool = False) -> str:
    """Return the text that an HTML document or a part of one shows.

    Args:
        markup: HTML.
        headings: whether a heading is written as Markdown writes it, `## Title`, with an empty line
            before it.
    """
    root = LexborHTMLParser(markup).root
    out = _Writer()
    if root is not None:
        _walk(root, out, headings)
    return "".join(out.parts)


class _Writer:
    """Text on its way out; a new line is written only once something follows."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._waiting = ""
        self._is_blank = True

    def block(self, line_ends: str = "\n") -> None:
        """Begin a new line, unless one has just begun."""
        if not self._is_blank and len(line_ends) > len(self._waiting):
            self._waiting = line_ends

    def text(self, said: str) -> None:
        if self._waiting:
            said = said.lstrip(" ")
            if not said.strip(" \t\r\n"):
                return  # white space between two blocks
            self.parts[-1] = self.parts[-1].rstrip(" \t")
            ready = "".join(self.parts[-2:])
            missing = len(self._waiting) - (len(ready) - len(ready.rstrip("\n")))
            self.parts.append("\n" * max(0, missing))
            self._waiting = ""
        if self._is_blank:
            said = said.lstrip()
        if said:
            self.parts.append(said)
            self._is_blank = False

    def cell(self) -> None:
        if self.parts and not self._waiting and not self.parts[-1].endswith("\t"):
            self.parts.append("\t")


def _walk(root: Any, out: _Writer, headings: bool) -> None:
    """Write a tree's text, without recursion: pages are nested as deep as somebody likes."""
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        name = (node.tag or "").lower()
        if is_done:
            out.block()
            continue
        if name == "-text":
            out.text(node.text_content or "")
            continue
        if name in _SILENT or name.startswith(("-", "!", "_")):
            continue
        if name in _BLOCKS:
            is_heading = headings and re.fullmatch(r"h[1-6]", name) is not None
            out.block("\n\n" if is_heading else "\n")
            stack.append((node, True))
            if is_heading and (node.text() or "").strip():
                out.text("#" * int(name[1]) + " ")
        elif name in _CELLS:
            out.cell()
        elif name == "img" and (node.attributes.get("alt") or "").strip():
            out.text(node.attributes["alt"])
        child = node.last_child
        while child is not None:
            stack.append((child, False))
            child = child.prev
