"""Which nodes are slow or broken, by what they say."""

from dataclasses import replace

from megavid.cluster.health import Facts, Limits, _gpu_words, judge

LIMITS = Limits()
GOOD = [
    Facts(
        rank=i, host=f"n{i // 2}", clock_s=100.0 + 0.1 * i, versions={"torch": "2.13"}, disk_free_gib=50.0,
        gpu_troubles=(), product_rate=1e12,
    )
    for i in range(8)
]  # fmt: skip


def found(facts: list[Facts]) -> list[tuple[str, str, str]]:
    return [(finding.host, finding.kind, finding.words) for finding in judge(facts, LIMITS)]


def test_good_nodes_are_left_alone() -> None:
    assert found(GOOD) == []


def test_one_slow_rank_makes_its_node_slow() -> None:
    facts = [replace(fact, product_rate=0.7e12) if fact.rank == 3 else fact for fact in GOOD]
    assert found(facts) == [("n1", "slow", "matrix products at 70% of the median node's rate")]


def test_clock_version_disk_and_gpus_break_a_node() -> None:
    wrong = {
        "clock_s": 110.0, "versions": {"torch": "2.12"}, "disk_free_gib": 0.5,
        "gpu_troubles": ("GPU 1: 3 uncorrected memory errors",),
    }  # fmt: skip
    facts = [replace(fact, **wrong) if fact.host == "n2" else fact for fact in GOOD]
    words = [text for host, kind, text in found(facts) if (host, kind) == ("n2", "broken")]
    assert any("torch 2.12, the other nodes have 2.13" in text for text in words)
    assert any("its clock is +9." in text for text in words)
    assert any("0.5 GiB free" in text for text in words)
    assert "GPU 1: 3 uncorrected memory errors" in words
    assert {host for host, _, _ in found(facts)} == {"n2"}


def test_gpu_fields_are_read_as_nvidia_smi_prints_them() -> None:
    assert _gpu_words("0, 0, No, Not Active") == []
    assert _gpu_words("1, [N/A], [N/A], Not Active") == []
    assert len(_gpu_words("2, 7, Yes, Active")) == 3
