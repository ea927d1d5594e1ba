"""Devices that are described: topologies of GPUs, and compilers that are missing."""

from importlib import metadata

import pytest

from switch_jax.distributed import hosts_of_gpus
from switch_jax.errors import UserError
from switch_jax.performance import CompileTarget


@pytest.mark.parametrize(
    "topology, hosts, gpus",
    [
        ("h100:1", 1, 1),
        ("h100:8", 1, 8),
        ("h200:4x8", 4, 8),
        ("h100:64", 8, 8),
        ("a100:2x4", 2, 4),
    ],
)
def test_gpus_are_on_hosts_of_eight_unless_the_topology_says_otherwise(topology, hosts, gpus):
    assert hosts_of_gpus(topology) == (hosts, gpus)


@pytest.mark.parametrize("topology", ["h100:12", "h100:2x2x2", "h100:", "h100:0", "h100:8x"])
def test_impossible_numbers_of_gpus_are_an_error_of_one_sentence(topology):
    with pytest.raises(UserError) as error:
        hosts_of_gpus(topology)
    assert "h100:64" in str(error.value) or "at least 1" in str(error.value)


@pytest.mark.parametrize(
    "topology, extra", [("v5p:2x2x1", "tpu"), ("h100:8", "cuda-compile")], ids=["tpu", "cuda"]
)
def test_a_missing_compiler_is_an_error_that_names_it(topology, extra, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match=rf"pip install 'switch_jax\[{extra}\]'"):
        CompileTarget(topology).devices()


def test_slices_of_gpus_and_unknown_kinds_are_refused():
    for topology, slices, words in (("h100:8", 2, "--slices is for TPUs"), ("mi300:8", 1, "name")):
        with pytest.raises(UserError, match=words):
            CompileTarget(topology, slices).devices()


@pytest.mark.skipif(
    not any(d.metadata["Name"] == "jax-cuda13-pjrt" for d in metadata.distributions()),
    reason="the CUDA compiler is not installed",
)
@pytest.mark.parametrize("topology, devices", [("h100:2", 2), ("b200:2x8", 16)])
def test_gpus_are_described_with_their_kind(topology, devices):
    described = CompileTarget(topology).devices()
    assert len(described) == devices
    assert {d.device_kind.split()[1] for d in described} <= {"H100", "B200"}
