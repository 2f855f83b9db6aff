"""Reading vLLM's counters from the text of a /metrics page."""

from __future__ import annotations

from serving.metrics import SpecCounters, counters_from_prometheus

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
