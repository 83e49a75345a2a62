"""What others train with reads our shards as they are."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset
from PIL import Image

from data_prep.prepare.plan import Plan
from infra.records import ShardRecord
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import FileStore, Store
from tests.data_prep.corpora import prepare_here, settings_for, write_corpus
from tests.data_prep.small_scorers import CONTEXT, build_clip


@pytest.fixture
def prepared(store: Store, folder: Path) -> tuple[Store, Plan]:
    write_corpus(folder / "small", 20)
    return store, prepare_here(store, settings_for(folder / "small", sizes=[32]))


def tars(store: Store, plan: Plan) -> list[tuple[ShardRecord, str]]:
    assert isinstance(store, FileStore)
    found = list(list_shards(store, shard_prefix(plan.digest, "32")))
    return [(record, str(store.root / record.tar.key)) for record in found if record.tar is not None]


def test_webdataset_reads_pictures_with_their_first_captions(prepared: tuple[Store, Plan]) -> None:
    for record, path in tars(*prepared):
        rows = [row for row in read_index(prepared[0], record).to_pylist() if row["accepted"]]
        found = webdataset.WebDataset(path, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt", "json")
        for row, (key, image, text, said) in zip(rows, found, strict=True):
            assert (key, image.size) == (row["key"], (32, 32))
            assert text == row["captions"][0]["text"] == said["captions"][0]["text"]


def test_open_clip_trains_a_step_with_its_own_pipeline(
    prepared: tuple[Store, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its command does with `--train-data`: its loader, its transform, its tokenizer, its loss."""
    import open_clip
    import torch
    from open_clip_train import data

    # It was written for a webdataset that put no marks between tars, and stumbles over them, whoever wrote the tars.
    monkeypatch.setattr(data, "tar_file_expander", partial(data.tar_file_expander, eof_value=None))
    build_clip(tmp_path / "clip")
    model, transform, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    found = tars(*prepared)
    arguments = SimpleNamespace(
        train_data="::".join(path for _, path in found),
        train_num_samples=8,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=0,
        world_size=1,
        batch_size=8,
    )
    loader = data.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader
    [(images, texts)] = list(loader)
    assert (images.shape, texts.shape) == ((8, 3, 32, 32), (8, CONTEXT))
    rows = [row for record, _ in found for row in read_index(prepared[0], record).to_pylist() if row["accepted"]]
    known = {tuple(tokenizer(row["captions"][0]["text"])[0].tolist()) for row in rows}
    assert {tuple(text.tolist()) for text in texts} <= known

    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    image_features, text_features, scale = model(images, texts)
    loss = open_clip.ClipLoss()(image_features, text_features, scale)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_picture_without_a_caption_has_no_text(store: Store, folder: Path) -> None:
    """An empty one would be trained on; recipes pass over what has none."""
    write_corpus(folder / "small", 10)
    source = settings_for(folder / "small").sources[0].model_dump() | {"captions": []}
    plan = prepare_here(store, settings_for(folder / "small", sources=[source], sizes=[32]))
    samples = [sample for _, path in tars(store, plan) for sample in webdataset.WebDataset(path, shardshuffle=False)]
    assert samples and not any("txt" in sample for sample in samples)


def test_texts_may_be_left_out(store: Store, folder: Path) -> None:
    write_corpus(folder / "small", 10)
    without = prepare_here(store, settings_for(folder / "small", sizes=[32], text=False))
    beside = prepare_here(store, settings_for(folder / "small", sizes=[32]))
    assert without.digest != beside.digest
    read = partial(webdataset.WebDataset, shardshuffle=False)
    for (_, plain), (_, path) in zip(tars(store, without), tars(store, beside), strict=True):
        for sample, whole in zip(read(plain), read(path), strict=True):
            assert "txt" not in sample and "txt" in whole
            assert (sample["__key__"], sample["jpg"], sample["json"]) == (whole["__key__"], whole["jpg"], whole["json"])
            assert Image.open(io.BytesIO(sample["jpg"])).size == (32, 32)
