import numpy as np
import openvla_checkpoint as published
import pytest
import torch

from vlaexp.errors import UserError
from vlaexp.model.action_tokenizer import ActionTokenizer

TOKENIZER = ActionTokenizer()
EDGES = torch.from_numpy(np.linspace(-1, 1, 256))


def test_round_trip_is_within_one_255th() -> None:
    action = torch.cat([torch.linspace(-1, 1, 100_001, dtype=torch.float64), EDGES])
    error = (TOKENIZER.decode(TOKENIZER.encode(action)) - action).abs()
    assert error.max() <= 1 / 255 + 1e-12


def test_ids_are_the_last_256_words() -> None:
    ids = TOKENIZER.encode(torch.linspace(-1, 1, 100_001))
    assert set(ids.tolist()) == set(range(31744, 32000))
    assert (TOKENIZER.first, TOKENIZER.bins) == (31744, 256)
    assert TOKENIZER.encode(torch.tensor([-1.0, 1.0])).tolist() == [31999, 31744]


def test_an_edge_belongs_to_the_interval_above_it() -> None:
    assert TOKENIZER.encode(EDGES).tolist() == list(range(31999, 31743, -1))
    below = torch.from_numpy(np.nextafter(EDGES.numpy(), -2))[1:]
    assert TOKENIZER.encode(below).tolist() == list(range(31999, 31744, -1))


def test_there_are_255_centres() -> None:
    centres = TOKENIZER.decode(torch.arange(31744, 32000))
    assert len(set(centres.tolist())) == 255
    assert centres[0] == centres[1] == pytest.approx(1 - 1 / 255)
    assert centres[-1] == pytest.approx(-1 + 1 / 255)


def test_what_lies_outside_is_clipped() -> None:
    assert TOKENIZER.encode(torch.tensor([-7.0, 7.0, -1.0000001])).tolist() == [31999, 31744, 31999]
    outside = TOKENIZER.decode(torch.tensor([2, 31743, 32000]))
    assert torch.equal(outside, TOKENIZER.decode(torch.tensor([31744, 31744, 31999])))


def test_edges_and_values_are_the_references() -> None:
    golden = published.recorded()
    ids = TOKENIZER.encode(torch.from_numpy(golden["edge_actions"]))
    assert np.array_equal(ids.numpy(), golden["edge_ids"])
    assert np.array_equal(TOKENIZER.decode(ids).numpy(), golden["edge_decoded"])


def test_too_many_bins_are_refused() -> None:
    with pytest.raises(UserError, match=r"n_action_bins=300; expected 2 to the tokenizer's 200 entries"):
        ActionTokenizer(200, 300)
