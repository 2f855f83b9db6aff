"""Reading vLLM's counters from the text of a /metrics page."""

from __future__ import annotations

import pytest

from serving.metrics import (
    ServerCounters,
    SpecCounters,
    counters_from_histogram,
    counters_from_prometheus,
    server_counters,
)

NOTHING = SpecCounters(0, 0, 0, ())
PAGE = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a b}"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a b}"} 5.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="a b}"} 1.79e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a b}"} 20.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="a b}"} 10.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="a b}"} 9.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="a b}"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a",position="0"} 7.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a",position="1"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="a",position="0"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="a",position="1"} 0.0
vllm:num_requests_running{engine="0"} 0.0
"""


def test_counters_are_summed_over_replicas() -> None:
    assert counters_from_prometheus(PAGE) == SpecCounters(15, 30, 10, (8, 2))


def test_a_page_without_speculation_counts_nothing() -> None:
    assert counters_from_prometheus("vllm:num_requests_running 0.0\n") == SpecCounters(0, 0, 0, ())


def test_difference_of_two_readings() -> None:
    later, nothing = counters_from_prometheus(PAGE), SpecCounters(0, 0, 0, ())
    assert later - nothing == later
    assert later - SpecCounters(5, 10, 4, (3, 1)) == SpecCounters(10, 20, 6, (5, 1))


TRAFFIC = """\
vllm:request_success_total{engine="0",finished_reason="stop",model_name="a"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="a"} 4.0
vllm:request_success_total{engine="1",finished_reason="length",model_name="a"} 1.0
vllm:request_success_created{engine="0",finished_reason="stop",model_name="a"} 1.79e+09
vllm:generation_tokens_total{engine="0",model_name="a"} 1.2e+03
vllm:generation_tokens_total{engine="1",model_name="a"} 34.0
"""


def test_models_of_one_page_are_told_apart() -> None:
    other = TRAFFIC.replace('model_name="a"', 'model_name="b"')
    assert server_counters(TRAFFIC + other) == ServerCounters(16, 2468, NOTHING)
    for names in (("b",), ("x", "b")):
        assert server_counters(TRAFFIC + other, names) == ServerCounters(8, 1234, NOTHING)
    assert server_counters(TRAFFIC, ("b",)) is None
    unnamed = TRAFFIC.replace(',model_name="a"', "")
    assert server_counters(unnamed, ("b",)) == ServerCounters(8, 1234, NOTHING)


@pytest.mark.parametrize(
    "page",
    ["<!DOCTYPE html>", "<html a='b'>\n{x} 1", "{", 'a{b="c', "not found", '{"error": 1}', ""],
)
def test_pages_of_other_kinds_have_no_counters(page: str) -> None:
    assert server_counters(page, ("a",)) is None


def test_requests_and_tokens_are_summed_too() -> None:
    counters = server_counters(PAGE + TRAFFIC)
    assert counters == ServerCounters(8, 1234, SpecCounters(15, 30, 10, (8, 2)))
    earlier = ServerCounters(7, 1200, SpecCounters(15, 30, 10, (8, 2)))
    assert counters - earlier == ServerCounters(1, 34, SpecCounters(0, 0, 0, (0, 0)))


def test_a_page_that_is_not_vllms_has_no_counters() -> None:
    assert server_counters("python_gc_objects_collected_total 5.0\n") is None


def test_a_page_that_is_no_metrics_page_has_none() -> None:
    assert server_counters("<html><body>Bad gateway {502}</body></html>") is None


def test_a_histogram_of_steps_gives_counters() -> None:
    assert counters_from_histogram([3, 2, 1], 18) == SpecCounters(6, 18, 4, (3, 1))
