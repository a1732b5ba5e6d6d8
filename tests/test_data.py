"""Calibration data of every kind, and what is said where there is none."""

import sys

import numpy as np
import pytest
from test_cli import REFERENCE
from tiny import tiny_config

import qjax
from qjax.config import CalibConfig
from qjax.data import DATASETS, calibration_data, check_ids
from qjax.errors import DataError

SMALL = CalibConfig(num_samples=4, batch_size=3, max_seq_length=8)


class Letters:
    """A tokenizer: a letter is a token, its code."""

    eos_token_id = 0

    def __call__(self, text, **how):
        assert how == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [ord(letter) for letter in text]}


def test_batches_are_taken_as_they_are():
    batches = [np.ones((2, 5), np.int32), np.zeros((1, 7), np.int64)]
    for data in (batches, tuple(batches), iter(batches), (b for b in batches)):
        found = calibration_data(data, None, SMALL)
        for a, b in zip(found, batches, strict=True):
            np.testing.assert_array_equal(a, b)
    assert calibration_data([], None, SMALL) == []
    assert calibration_data(None, None, None) == []


def test_texts_are_joined_and_cut():
    """One after the other with an end token between them; nothing is padded."""
    texts = ["abcdefghij", "klmnop", "qrstuvwxyz" * 3]
    first, second = calibration_data(texts, Letters(), SMALL)
    assert (first.shape, second.shape) == ((3, 8), (1, 8))
    joined = "\0".join(texts)[:32]
    rows = np.concatenate([first, second])
    assert "".join(chr(i) for i in rows.reshape(-1)) == joined
    with pytest.raises(DataError, match=r"has 18 tokens; 4 sequences of 8 need 32"):
        calibration_data(texts[:2], Letters(), SMALL)


@pytest.mark.heavy
def test_the_standard_library():
    lm = qjax.load(REFERENCE)
    calib = CalibConfig(num_samples=5, batch_size=2, max_seq_length=64, dataset="stdlib")
    batches = calibration_data(None, lm.tokenizer, calib)
    assert [b.shape for b in batches] == [(2, 64), (2, 64), (1, 64)]
    again = calibration_data("stdlib", lm.tokenizer, calib)
    other = calibration_data(None, lm.tokenizer, CalibConfig(**vars(calib) | {"seed": 1}))
    for a, b, c in zip(batches, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
    with pytest.raises(DataError, match=r"the text holds .* not 1000000"):
        calibration_data(None, lm.tokenizer, CalibConfig(num_samples=10**6, dataset="stdlib"))


def test_a_text_file(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("abcdefgh" * 4)
    batches = calibration_data(str(path), Letters(), SMALL)
    assert sum(len(b) for b in batches) == 4
    np.testing.assert_array_equal(calibration_data(path, Letters(), SMALL)[0], batches[0])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"my\.txt cannot be read"):
        calibration_data(path, Letters(), SMALL)


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """`datasets` without a network, its cache in a folder of the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def test_local_data_sets(quiet, tmp_path):
    rows = {"text": ["abcdefgh" * 4, "ijklmnop" * 4], "number": [1, 2]}
    data = quiet.Dataset.from_dict(rows)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_json(str(tmp_path / "rows.jsonl"))
    for source in ("saved", "rows.jsonl"):
        found = calibration_data(str(tmp_path / source), Letters(), SMALL)
        letters = {chr(i) for b in found for i in b.reshape(-1)} - {"\0"}
        assert letters <= set("abcdefghijklmnop")
    talk = [{"role": "user", "content": "abcd" * 9}, {"role": "assistant", "content": "efgh"}]
    quiet.Dataset.from_dict({"messages": [talk]}).save_to_disk(str(tmp_path / "talk"))
    found = calibration_data(str(tmp_path / "talk"), Letters(), SMALL)
    assert chr(found[0][0, 0]) == "a"
    quiet.Dataset.from_dict({"number": [1]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(DataError, match="one must be of"):
        calibration_data(str(tmp_path / "numbers"), Letters(), SMALL)


@pytest.mark.parametrize("name", DATASETS)
def test_without_a_network_the_ways_out_are_named(name, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **settings):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"without the network.*local copy.*dataset='stdlib'"):
        calibration_data(name, Letters(), SMALL)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package 'datasets'"):
        calibration_data("c4", Letters(), SMALL)


def test_other_bad_data():
    with pytest.raises(DataError, match=r"no calibration data 'nothing': choose one of c4, "):
        calibration_data("nothing", Letters(), SMALL)
    with pytest.raises(DataError, match="needs a tokenizer"):
        calibration_data(["text"], None, SMALL)
    with pytest.raises(DataError, match=r"token ids 0\.\.256 are outside the vocabulary"):
        check_ids([[0, 256]], tiny_config())
    with pytest.raises(DataError, match="do not fit the model's context of 256"):
        check_ids(np.zeros((1, 257), int), tiny_config())
