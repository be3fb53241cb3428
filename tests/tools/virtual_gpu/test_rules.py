"""Which test holds each rule against a formula of its own."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

import tools.virtual_gpu.executor  # noqa: F401  (registers the rules)
from tools.virtual_gpu.rules import _RULES

FOLDER = __name__.rpartition(".")[0]

# An opcode of each rule: the test that executes it, in PTX of the test's own. Of a rule for several
# functions or types the test has the others as well.
TESTED = {
    "test_arithmetic": {
        "add.s32": "test_integers_are_those_of_python",
        "mul.hi.s32": "test_integers_are_those_of_python",
        "div.s32": "test_integers_are_those_of_python",
        "min.s32": "test_integers_are_those_of_python",
        "shr.s32": "test_integers_are_those_of_python",
        "bfe.s32": "test_bit_fields_are_those_of_the_manual",
        "popc.b32": "test_bits_are_counted_and_turned_round",
        "prmt.b32": "test_bytes_are_permuted_as_in_the_manual",
        "fma.rn.f32": "test_a_fused_multiply_add_rounds_once",
        "div.rn.f64": "test_float64_rounds_once",
        "min.NaN.f32": "test_comparisons_smaller_and_larger_with_nan_and_zeros",
        "setp.neu.f32": "test_comparisons_smaller_and_larger_with_nan_and_zeros",
        "cvt.f32.bf16": "test_narrow_formats_round_as_pytorch_rounds",
        "cvt.rn.bf16.f32": "test_narrow_formats_round_as_pytorch_rounds",
        "cvt.rn.bf16x2.f32": "test_narrow_formats_round_as_pytorch_rounds",
        "cvt.rna.tf32.f32": "test_tf32_rounds_to_eleven_bits_ties_away",
        "cvt.rn.f32.f64": "test_float64_is_narrowed_and_counted_with_one_rounding",
        "cvt.rn.f64.s64": "test_float64_is_narrowed_and_counted_with_one_rounding",
        "cvt.rzi.s32.f32": "test_integers_of_floats_saturate",
    },
    "test_functions": {
        "mul.f32": "test_sums_and_products_round_once",
        "ex2.approx.f32": "test_functions_are_the_nearest_float32_but_tanh",
        "div.full.f32": "test_quotients_are_the_nearest_float32",
        "sqrt.rn.f64": "test_roots_and_reciprocals_of_float64_round_once",
        "neg.s32": "test_signs_of_numbers",
        "or.b32": "test_bits_of_every_width_and_predicates",
        "not.b32": "test_bits_of_every_width_and_predicates",
        "selp.u32": "test_bits_of_every_width_and_predicates",
        "mov.b64": "test_parts_of_a_register_lie_from_the_lowest_up",
        "setp.lt.s32": "test_integers_are_compared_with_and_without_sign",
        "cvt.s64.s8": "test_integers_are_widened_by_their_sign_and_narrowed_by_their_low_bits",
        "cvt.rn.f32.s8": "test_integers_are_widened_by_their_sign_and_narrowed_by_their_low_bits",
    },
    "test_halves": {
        "fma.rn.bf16": "test_halves_round_once",
        "neg.bf16x2": "test_signs_of_halves",
        "max.NaN.bf16": "test_a_number_is_smaller_than_nan_unless_nan_is_asked_for",
        "ex2.approx.ftz.bf16": "test_approximations_of_halves_are_the_nearest_halves",
        "add.rn.f32.bf16": "test_sums_of_halves_and_float32_are_float32",
        "fma.rn.f32x2": "test_two_float32_in_a_register_are_each_as_one",
        "max.f32": "test_the_largest_of_three",
    },
    "test_warps": {
        "redux.sync.add.s32": "test_a_reduction_of_a_warp_is_in_all_of_its_lanes",
        "vote.sync.ballot.b32": "test_votes_are_those_of_the_lanes",
    },
    "test_executor": {
        "shfl.sync.bfly.b32": "test_lanes_hand_each_other_what_the_manual_says",
        "bar.warp.sync": "test_threads_are_ordered_by_barriers_and_lanes_by_those_of_their_warp",
    },
    "test_transfers": {
        "ld.param.b64": "test_parameters_are_what_the_launch_was_given",
        "ld.shared.s16": "test_vectors_and_narrow_numbers_come_and_go",
        "st.shared.v2.b16": "test_vectors_and_narrow_numbers_come_and_go",
        "cp.async.ca.shared.global": "test_copies_bring_what_they_are_told_to_and_zeros",
        "cp.async.commit_group": "test_copies_bring_what_they_are_told_to_and_zeros",
        "cp.async.wait_group": "test_copies_bring_what_they_are_told_to_and_zeros",
    },
    "test_tensor_cores": {
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16": (
            "test_matrices_of_shared_memory_come_and_go_in_the_manual_s_order"
        ),
        "stmatrix.sync.aligned.m8n8.x4.shared.b16": (
            "test_matrices_of_shared_memory_come_and_go_in_the_manual_s_order"
        ),
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": (
            "test_a_product_of_fragments_is_the_product_of_the_matrices"
        ),
        "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64": (
            "test_a_product_in_float64_is_that_of_the_matrices"
        ),
    },
    "test_atomics": {
        "atom.global.gpu.acq_rel.add.f32": "test_each_lane_once_in_their_order",
        "red.global.gpu.relaxed.add.u64": "test_what_is_atomic_for_a_block_is_not_for_two",
        "fence.acq_rel.gpu": "test_fences_make_releases_and_acquires_of_relaxed_atomics",
    },
    "test_warpgroups": {
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16": (
            "test_a_product_of_fragments_is_the_product_of_the_matrices"
        ),
        "wgmma.fence.sync.aligned": "test_every_fence_and_wait_is_needed",
        "wgmma.commit_group.sync.aligned": "test_every_fence_and_wait_is_needed",
        "wgmma.wait_group.sync.aligned": "test_every_fence_and_wait_is_needed",
        "fence.proxy.async": "test_every_fence_and_wait_is_needed",
    },
    "test_bulk_copies": {
        "mbarrier.init.shared::cta.b64": "test_an_mbarrier_orders_what_lies_before_its_arrivals",
        "mbarrier.arrive.shared::cta.b64": "test_an_mbarrier_orders_what_lies_before_its_arrivals",
        "mbarrier.try_wait.parity.shared::cta.b64": "test_a_copy_is_over_when_its_bytes_have_come",
        "elect.sync": "test_one_lane_of_a_warp_is_elected",
        "cvta.global.u64": "test_a_box_comes_and_goes_with_zeros_outside",
        "cvta.param.u64": "test_the_address_of_a_parameter_is_one_of_its_space",
        "tensormap.replace.tile.rank.shared::cta.b1024.b32": (
            "test_a_box_comes_and_goes_with_zeros_outside"
        ),
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned": (
            "test_a_box_comes_and_goes_with_zeros_outside"
        ),
        "fence.proxy.tensormap::generic.acquire.gpu": "test_without_a_statement_there_is_a_fault",
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes": (
            "test_a_box_comes_and_goes_with_zeros_outside"
        ),
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group": (
            "test_a_box_comes_and_goes_with_zeros_outside"
        ),
        "cp.async.bulk.commit_group": "test_a_stored_box_is_overwritten_when_it_was_waited_for",
        "cp.async.bulk.wait_group.read": "test_a_stored_box_is_overwritten_when_it_was_waited_for",
    },
}
OF_OTHER_FILES = ("mutant", "touch", "trace")
"""Statements that watch others, which no kernel has."""


@pytest.mark.parametrize("name", TESTED)
def test_the_tests_of_the_list_are_there(name: str) -> None:
    module = importlib.import_module(f"{FOLDER}.{name}")
    source = inspect.getsource(module)
    for opcode, test in TESTED[name].items():
        assert callable(getattr(module, test, None)), f"{name} has no {test}"
        first = opcode.partition(".")[0]
        assert re.search(rf"\b{first}\b", source), f"nothing in {name} is about {first}"


def test_every_rule_is_in_the_list() -> None:
    """A new rule needs a test of its own, and its line there."""
    opcodes = {opcode for tests in TESTED.values() for opcode in tests}
    unknown = set(opcodes)
    for name, rules in _RULES.items():
        for pattern, _ in rules:
            mine = {opcode for opcode in opcodes if pattern.fullmatch(opcode)}
            assert mine or name in OF_OTHER_FILES, f"no test of {pattern.pattern}"
            unknown -= mine
    assert not unknown, f"no rules are there for {sorted(unknown)}"
