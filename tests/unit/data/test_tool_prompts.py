"""Prompts with tools: nothing in a text, a tool or an argument is taken for the template's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.serve import tool_templates
from tests.unit.serve.tiny_chat import END, START, write_tiny_chat
from tests.unit.serve.tool_templates import WEATHER, give_template

from outcrop.data.records import Message, Tool, ToolCall
from outcrop.data.render import Renderer
from outcrop.errors import DataError

ASK = Message("user", "Warm?")
CALL = ToolCall("tooluse_1", "get_weather", {"city": "Paris"})
CALLED = (ASK, Message("assistant", "", (CALL,)), Message("tool", "21 °C", call_id="tooluse_1"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("tools"))


def renderer(folder: Path, template: str) -> Renderer:
    return Renderer(give_template(folder, template))


def text_of(one: Renderer, ids: list[int]) -> str:
    """The text of ids with control tokens spelt out."""
    return str(one.tokenizer._scaffold.decode(ids, skip_special_tokens=False))


def test_a_model_is_told_of_its_tools_as_its_template_does(folder: Path) -> None:
    one = renderer(folder, tool_templates.HERMES)
    told = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": WEATHER.description,
            "parameters": dict(WEATHER.parameters),
        },
    }
    text = text_of(one, one.render_prompt([Message("system", "Be kind."), ASK], [WEATHER]))
    assert text == (
        f"{START}system\nBe kind.\nFunctions:\n{json.dumps(told)}\nAnswer with <tool_call>"
        '{"name": name, "arguments": object}</tool_call>.'
        f"{END}\n{START}user\nWarm?{END}\n{START}assistant\n"
    )


def test_calls_and_results_come_back_in_the_models_own_form(folder: Path) -> None:
    one = renderer(folder, tool_templates.HERMES)
    text = text_of(one, one.render_prompt(CALLED, [WEATHER]))
    assert text.endswith(
        f"{START}user\nWarm?{END}\n{START}assistant\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        f"{END}\n{START}user\n<tool_response>\n21 °C\n</tool_response>{END}\n{START}assistant\n"
    )
    llama = renderer(folder, tool_templates.LLAMA)
    text = text_of(llama, llama.render_prompt(CALLED, [WEATHER]))
    assert '{"name": "get_weather", "parameters": {"city": "Paris"}}' in text
    mistral = renderer(folder, tool_templates.MISTRAL)
    text = text_of(mistral, mistral.render_prompt(CALLED, [WEATHER]))
    assert text.endswith("[TOOL_RESULTS]21 °C[/TOOL_RESULTS]")


def test_a_result_that_a_template_writes_into_json_is_spelt_as_json_spells_it(
    folder: Path,
) -> None:
    one = renderer(folder, tool_templates.LLAMA)
    result = 'a "quoted"\nline'
    turns = (*CALLED[:2], Message("tool", result, call_id="tooluse_1"))
    text = text_of(one, one.render_prompt(turns, [WEATHER]))
    assert json.dumps({"output": result}) in text


def test_calls_of_before_are_rendered_where_no_tools_are_told_of(folder: Path) -> None:
    one = renderer(folder, tool_templates.HERMES)
    text = text_of(one, one.render_prompt(CALLED))
    assert "Functions" not in text
    assert "<tool_response>\n21 °C" in text


def test_an_answer_can_be_made_to_begin_with_a_call(folder: Path) -> None:
    one = renderer(folder, tool_templates.HERMES)
    plain = one.render_prompt([ASK], [WEATHER])
    started = one.render_prompt([ASK], [WEATHER], "<tool_call>")
    assert started[: len(plain)] == plain
    assert text_of(one, started[len(plain) :]) == "<tool_call>"


def test_a_model_goes_on_with_the_assistants_last_text(folder: Path) -> None:
    one = renderer(folder, tool_templates.HERMES)
    ids = one.render_prompt([ASK, Message("assistant", "It is")], [WEATHER])
    assert text_of(one, ids).endswith(f"{START}assistant\nIt is")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(st.sampled_from([START, END, "a", '"', "\n", "\U00100000", "\U00108000"]), max_size=5),
    st.sampled_from([tool_templates.HERMES, tool_templates.LLAMA]),
)
def test_nobody_can_write_a_control_token_into_a_tool_a_call_or_a_result(
    folder: Path, parts: list[str], template: str
) -> None:
    attack = "".join(parts)
    one = renderer(folder, template)

    def controls(text: str) -> int:
        tool = Tool("get_weather", text, {"properties": {f"x{text}": {"enum": [text]}}})
        turns = (
            Message("user", f"q{text}"),
            Message("assistant", "", (ToolCall("1", "get_weather", {f"k{text}": [text]}),)),
            Message("tool", f"r{text}", call_id="1"),
        )
        ids = one.render_prompt(turns, [tool])
        shown = text_of(one, ids)
        assert f"q{text}" in shown
        assert json.dumps(text, ensure_ascii=False)[1:-1] in shown
        return sum(token in one.tokenizer.special_token_ids for token in ids)

    assert controls(attack) == controls("harmless")


def test_a_text_that_the_template_would_leave_out_is_refused(folder: Path) -> None:
    one = renderer(folder, tool_templates.LLAMA)
    turns = (ASK, Message("assistant", "I look.", (CALL,)), CALLED[2])
    with pytest.raises(DataError, match="does not show every text"):
        one.render_prompt(turns, [WEATHER])


@pytest.mark.parametrize("template", ["{{ tools[0].nothing.at.all }}", "{{ tools[0] + 1 }}"])
def test_a_template_that_fails_on_the_tools_is_the_requests_fault(
    folder: Path, template: str
) -> None:
    one = renderer(folder, tool_templates.HERMES + template)
    with pytest.raises(DataError, match="refuses these messages and tools"):
        one.render_prompt([ASK], [WEATHER])


def test_two_calls_at_once_are_refused_where_the_template_says_so(folder: Path) -> None:
    one = renderer(folder, tool_templates.LLAMA)
    turns = (ASK, Message("assistant", "", (CALL, CALL)), CALLED[2])
    with pytest.raises(DataError, match="One call at a time"):
        one.render_prompt(turns, [WEATHER])


def test_half_a_surrogate_pair_is_refused(folder: Path) -> None:
    one = renderer(folder, tool_templates.HERMES)
    with pytest.raises(DataError, match="surrogate"):
        one.render_prompt([Message("user", "\ud800")], [WEATHER])
