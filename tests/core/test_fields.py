"""Configs: each value has a type and a range, and what isn't so is named in one line."""
import json
import math
from dataclasses import asdict, dataclass
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccra import CCRAConfig
from clip import CLIPTextConfig, CLIPVisionConfig
from core.common import DEPTH, UserError, one_line, read_json
from core.fields import Epsilon, Id, Range, Width, check_config, fits, read, wanted
from core.layouts import rope_of
from fusers import FUSERS
from llama import LlamaConfig
from tests.core.helpers import LLAMA31, TEXT, fails

CONFIGS = [CCRAConfig, CLIPVisionConfig, CLIPTextConfig, *(config for _, config in FUSERS.values())]
ALL = [*(config() for config in CONFIGS), LlamaConfig(**TEXT)]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10 ** 30), st.sampled_from([10 ** 9, -10 ** 30]),
    st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))


@dataclass
class ThingConfig:
    size: Width
    eps: Epsilon = 1e-5
    kind: Annotated[str, ("a", "b")] = "a"
    ends: Id | list[Id] | None = None
    names: dict[str, int] | None = None
    fine: bool = True

    def __post_init__(self):
        check_config(self)


GOOD = [{"size": 1}, {"size": 2 ** 17, "eps": 1}, {"size": 3, "kind": "b", "ends": 0, "x": []},
        {"size": 3, "ends": [1, 2], "names": {"a": 1}, "fine": False}]
BAD = [{}, {"size": 0}, {"size": True}, {"size": 2.0}, {"size": 10 ** 9}, {"size": "3"},
       {"size": 1, "eps": 0}, {"size": 1, "eps": math.nan}, {"size": 1, "eps": -math.inf},
       {"size": 1, "eps": True}, {"size": 1, "eps": 10 ** 400}, {"size": 1, "kind": "c"},
       {"size": 1, "kind": ["a"]}, {"size": 1, "ends": -1}, {"size": 1, "ends": [1, False]},
       {"size": 1, "names": {"a": "b"}}, {"size": 1, "fine": 1}, [], None, "x"]


def test_a_config_is_what_its_table_says():
    for settings_ in GOOD:
        assert read(ThingConfig, settings_, "x.json").size == settings_["size"]
    for settings_ in BAD:
        with fails("x.json", "Thing", "should be"):
            read(ThingConfig, settings_, "x.json")
    assert read(ThingConfig, {}, "x.json", {"size": 5}).size == 5
    with fails("size = 'a\\nb' should be a whole number from 1 to 131072"):
        read(ThingConfig, {"size": "a\nb"}, "x.json")
    assert wanted(Id | list[Id] | None).endswith("or null")
    assert fits(2, Annotated[float, Range(1, 3)])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_setting_of_every_config_is_checked(data):
    """Any value in any place: the config takes it or says in one line which it is."""
    config = data.draw(st.sampled_from(ALL))
    given_ = asdict(config)
    name = data.draw(st.sampled_from(list(given_)))
    value = data.draw(VALUES)
    try:
        made = type(config)(**{**given_, name: value})
        assert type(getattr(made, name)) is not bool or type(getattr(config, name)) is bool
        json.dumps(asdict(made))
    except UserError as e:
        assert name in str(e) and "\n" not in str(e) and len(str(e)) < 400


# --------------------------------------------------------------------------------------------------
# Positions

SCALED = {key: value for key, value in LLAMA31.items() if key != "rope_theta"}


@pytest.mark.parametrize("said", [
    {"rope_scaling": []}, {"rope_scaling": {"type": "linear"}}, {"rope_scaling": {"factor": 8.0}},
    {"rope_scaling": {"rope_type": ["llama3"]}}, {"rope_scaling": {"rope_type": None}},
    {"rope_scaling": {**SCALED, "mrope_section": [1]}}, {"rope_scaling": {**SCALED, "a\nb": 1}},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {"rope_ratio": 2},
    {"rotary_pct": 0.5}, {"partial_rotary_factor": 0.5}, {"rope_interleaved": True},
    {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
    {"rope_scaling": {**SCALED, "type": "linear"}}, {"rope_scaling": {"type": "dynamic"}},
    {"rope_scaling": SCALED, "rope_parameters": {**SCALED, "factor": 32.0}}])
def test_positions_that_are_not_known_are_refused(said):
    with fails("x.json", "implemented" if said.get("rope_scaling", {}) != [] else "object"):
        rope_of(said, "x.json")


@pytest.mark.parametrize("change", [
    {"factor": None}, {"factor": 0}, {"factor": math.nan}, {"low_freq_factor": 4.0},
    {"factor": "8"}, {"original_max_position_embeddings": True}, {"rope_theta": math.inf}])
def test_scaled_positions_have_ranges(change):
    with fails("x.json", next(iter(change))):
        LlamaConfig.from_dict({**TEXT, "model_type": "llama",
                               "rope_parameters": {**LLAMA31, **change}}, "x.json")


def test_positions_in_every_public_form():
    want = {"rope_theta": 5e5, "rope_scaling": SCALED}
    for said in ({"rope_theta": 5e5, "rope_scaling": SCALED}, {"rope_parameters": LLAMA31},
                 {"rope_theta": 5e5, "rope_scaling": {**SCALED, "type": "llama3"}},
                 {"rope_interleaved": False, "rope_scaling": None, "rope_parameters": LLAMA31}):
        assert rope_of(said, "") == want
    for said in ({}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}},
                 {"rope_theta": 10000, "partial_rotary_factor": 1.0}):
        assert rope_of(said, "") == {"rope_theta": 10000.0, "rope_scaling": None}


# --------------------------------------------------------------------------------------------------
# Before any of it: text

def test_deep_and_large_json(tmp_path):
    file = tmp_path / "x.json"
    for levels, fine in ((DEPTH - 1, True), (DEPTH, False), (1000, False), (10 ** 5, False)):
        file.write_text('{"a": ' + "[" * levels + "]" * levels + "}")
        if fine:
            assert list(read_json(file)) == ["a"]
        else:
            with fails(file):
                read_json(file)
    with fails(file, "bytes"):
        read_json(file, most=100)


def test_an_error_is_one_line_whatever_it_names():
    assert str(UserError("a\nb\x1b[2J\u2028é\u202f.png")) == r"a\nb\x1b[2J\u2028é" + "\u202f.png"
    assert str(UserError("first", "second")) == "first\nsecond"
    assert len(one_line("x" * 10 ** 6)) < 2100 and str(UserError()) == ""
