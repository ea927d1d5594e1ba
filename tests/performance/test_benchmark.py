"""Benchmark of decoding."""

import dataclasses

import pytest

from switch_jax.distributed.mesh import make_mesh
from switch_jax.performance import benchmark
from switch_jax.performance.benchmark import _time_decoding
from switch_jax.training.step import TrainProgram
from tests.support.configs import tiny


def test_decoding_times_and_their_ratio(monkeypatch):
    monkeypatch.setattr(benchmark, "DECODING", {"beam4_2": (2, 4)})
    config = tiny(**{"mesh.data": 1})
    dense = dataclasses.replace(config, moe=dataclasses.replace(config.moe, num_experts=0))
    mesh = make_mesh(config)
    programs = {"sparse": TrainProgram(config, mesh), "dense": TrainProgram(dense, mesh)}
    compared = _time_decoding(programs, 1)["beam4_2"]
    for report in (compared["sparse"], compared["dense"]):
        assert report["ms_per_token"] * 8 == pytest.approx(1e3 * report["seconds"])
        assert report["tokens_per_second"] * report["seconds"] == pytest.approx(2 * 8)
    ratio = compared["sparse"]["seconds"] / compared["dense"]["seconds"]
    assert compared["ratio"] == pytest.approx(ratio)
