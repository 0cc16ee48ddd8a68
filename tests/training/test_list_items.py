import json

import pytest
from jsonargparse import Namespace

from t2v.errors import UserError
from t2v.training.list_items import set_items, split_items


@pytest.fixture
def config() -> Namespace:
    inner = Namespace(class_path="N", init_args=Namespace(a=1))
    losses = [
        Namespace(class_path="L1", init_args=Namespace(weight=1.0)),
        Namespace(class_path="L2", init_args=Namespace(weight=2.0, inner=inner)),
    ]
    model = Namespace(class_path="M", init_args=Namespace(losses=losses))
    return Namespace(model=model, data=Namespace(buckets=[Namespace(frames=4)]))


def test_flags_are_split():
    args = ["fit", "--model.losses.0.weight=2", "--data.size", "3", "--model.losses.1.inner.a", "[1, 2]"]
    others, items = split_items(args)
    assert others == ["fit", "--data.size", "3"]
    assert items == [("model.losses", 0, "weight", "2"), ("model.losses", 1, "inner.a", "[1, 2]")]


def test_items_are_set_in_their_list(config):
    items = [
        ("model.losses", 0, "weight", "3"),
        ("model.losses", 1, "inner.a", "x"),
        ("data.buckets", 0, "frames", "8"),
    ]
    losses, buckets = (flag.partition("=") for flag in set_items(config, items))
    assert (losses[0], buckets[0]) == ("--model.losses", "--data.buckets")
    assert json.loads(buckets[2]) == [{"frames": 8}]
    first, second = json.loads(losses[2])
    assert first == {"class_path": "L1", "init_args": {"weight": 3}}
    assert second["init_args"] == {"weight": 2.0, "inner": {"class_path": "N", "init_args": {"a": "x"}}}
    assert config.model.init_args.losses[0].init_args.weight == 1.0


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("model.losses", 2, "weight", "1"), "sets item 2 of model.losses, which has 2, counted from 0"),
        (("model.gone", 0, "weight", "1"), "sets an item of model.gone, which is no list"),
        (("model.losses", 0, "weight", "[1"), r"--model.losses.0.weight has the value \[1, which is no YAML"),
    ],
)
def test_an_item_that_cannot_be_set(config, item, message):
    with pytest.raises(UserError, match=message):
        set_items(config, [item])
