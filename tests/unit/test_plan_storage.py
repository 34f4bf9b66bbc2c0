"""Bytes, rates and money of a data set: the field's figures, arithmetic by hand, and what has no published price."""

from dataclasses import replace

import pytest

from megavid.errors import ConfigError
from megavid.plan.storage import DataSet, break_evens, gpu_hour, kinds, read_rates, store, store_names, tokenizers

WAN = DataSet(clips=1_000_000_000, frames=81, height=480, width=832, text_length=512, text_size=4096)


def by_name(data: DataSet) -> dict[str, float]:
    return {kind.name: kind.total_bytes for kind in kinds(data, store("s3"))}


def test_a_billion_clips_of_5_mb_are_5_pb_and_their_latents_about_as_much_again() -> None:
    sizes = by_name(WAN)
    assert sizes["video"] == 5e15
    assert sizes["latents 8x8x4 bf16"] == pytest.approx(sizes["video"], rel=0.2)
    assert sizes["text features bf16"] == pytest.approx(sizes["latents 8x8x4 bf16"], rel=0.01)


def test_latents_are_channels_times_positions() -> None:
    sizes = by_name(replace(WAN, clips=1))
    assert sizes["latents 8x8x4 bf16"] == 16 * 21 * 60 * 104 * 2
    assert sizes["latents 8x8x1 bf16"] == 16 * 81 * 60 * 104 * 2
    assert sizes["latents 16x16x4 bf16"] == 48 * 21 * 30 * 52 * 2
    for key in ("8x8x4", "8x8x1", "16x16x4"):
        assert sizes[f"latents {key} fp8"] == sizes[f"latents {key} bf16"] / 2
    assert sizes["text ids"] == 512 * 4


def test_image_to_video_keeps_latents_twice_and_image_features() -> None:
    plain, given = (replace(WAN, clips=1), replace(WAN, clips=1, latents_of_clip=2, image_numbers=257 * 1280))
    assert by_name(given)["latents 8x8x4 bf16"] == 2 * by_name(plain)["latents 8x8x4 bf16"]
    assert by_name(given)["image features bf16"] == 257 * 1280 * 2
    assert "image features bf16" not in by_name(plain)
    for one, two in zip(break_evens(plain, store("s3")), break_evens(given, store("s3")), strict=True):
        assert two.encode_cost == 2 * one.encode_cost


def test_an_image_has_one_latent_frame() -> None:
    assert [tokenizer.latent_numbers(1, 480, 832) for tokenizer in tokenizers()] == [
        16 * 60 * 104, 48 * 30 * 52, 16 * 60 * 104,
    ]  # fmt: skip


def test_tiers_price_each_gigabyte_by_the_tier_it_is_in() -> None:
    s3 = store("s3")
    tera = 1024 * s3.gigabyte
    assert s3.storage_month(50 * tera) == pytest.approx(51200 * 0.023)
    assert s3.storage_month(600 * tera) == pytest.approx(51200 * 0.023 + 460800 * 0.022 + 102400 * 0.021)
    assert s3.egress_once(5 * tera) == pytest.approx(5120 * 0.09)
    assert store("r2").egress_once(5e15) == 0


def test_requests_are_one_a_clip() -> None:
    video = kinds(WAN, store("s3"))[0]
    assert (video.write_once, video.read_epoch) == pytest.approx((5000.0, 400.0))


def test_encoding_in_every_epoch_costs_the_same_at_the_break_even() -> None:
    data = replace(WAN, clips=1_000_000, months=6)
    found = {row.name: row for row in break_evens(data, store("s3"))}
    for name in ("latents 8x8x4 bf16", "latents 16x16x4 fp8"):
        row = found[name]
        assert row.encode_cost == pytest.approx(row.encode_gpu_s * 1e6 / 3600 * gpu_hour("a100-80gb").hour)
        every_epoch, once = row.epochs * row.encode_cost, row.encode_cost + row.keep_cost
        assert every_epoch == pytest.approx(once)
    assert found["latents 8x8x4 fp8"].epochs < found["latents 8x8x4 bf16"].epochs


def test_the_published_encoder_time_scales_with_pixels() -> None:
    wan21 = tokenizers()[0]
    assert wan21.encode_s(81, 720, 1280) == pytest.approx(5.113, rel=1e-3)
    assert wan21.encode_s(81, 480, 832) == pytest.approx(5.113 * 480 * 832 / (720 * 1280), rel=1e-3)


def test_where_no_encoder_time_is_published_there_is_no_break_even_until_one_is_given() -> None:
    name = "latents 8x8x1 bf16"
    none = {row.name: row for row in break_evens(WAN, store("s3"))}[name]
    given = {row.name: row for row in break_evens(replace(WAN, encode_gpu_s=3.0), store("s3"))}[name]
    assert (none.epochs, none.encode_gpu_s) == (0, 0)
    assert given.epochs > 1
    assert given.source == "--encode-gpu-s"


def test_every_rank_of_a_replica_reads_the_replicas_clips() -> None:
    rates = {rate.name: rate for rate in read_rates(WAN, clips_per_step=256, step_time_s=8.0, ranks=1024, replicas=16)}
    video = rates["video"]
    assert video.unique_rate == 256 * 5e6 / 8
    assert video.rank_rate == video.unique_rate / 16
    assert video.job_rate == video.rank_rate * 1024


def test_every_price_has_a_source_and_a_date() -> None:
    rows = [store(name) for name in store_names()] + [gpu_hour(tokenizer.gpu) for tokenizer in tokenizers()]
    assert all(row.source and len(row.read) == len("2026-06") for row in rows)
    assert all(tokenizer.source for tokenizer in tokenizers())


def test_an_unknown_store_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"--store s4: .*there are s3, r2"):
        store("s4")
