"""Objects to JSON and back."""

import json
from abc import ABC, abstractmethod

import pytest

from t2v.checkpoints.config import from_config, to_config
from t2v.errors import UserError


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


class Square(Shape):
    def __init__(self, side: float) -> None:
        self.side = side

    def area(self) -> float:
        return self.side**2


class Scaled(Shape):
    def __init__(self, shape: float | Shape, factor: float = 2.0, labels: list[str] | None = None) -> None:
        self.shape, self.factor, self.labels = shape, factor, labels

    def area(self) -> float:
        return self.factor * (self.shape.area() if isinstance(self.shape, Shape) else self.shape)


@pytest.mark.parametrize("shape", [Square(3.0), Scaled(5.0, labels=["a"]), Scaled(Scaled(Square(3.0)), factor=0.5)])
def test_an_object_survives_json(shape):
    config = to_config(shape)
    rebuilt = from_config(json.loads(json.dumps(config)), Shape)
    assert type(rebuilt) is type(shape)
    assert rebuilt.area() == shape.area()
    assert to_config(rebuilt) == config


def test_numbers_are_unchanged():
    assert to_config(1.5) == 1.5
    assert from_config(1.5, Shape) == 1.5


def test_a_value_that_json_does_not_have_is_refused():
    with pytest.raises(TypeError, match="type set"):
        to_config(Scaled(5.0, labels={"a"}))


def test_arguments_left_out_take_their_defaults():
    path = to_config(Square(1.0))["class_path"].replace("Square", "Scaled")
    assert from_config({"class_path": path, "init_args": {"shape": 3.0}}, Shape).area() == 6.0


def test_a_class_has_the_paths_of_the_packages_that_export_it():
    from t2v.generation import Linear
    from t2v.generation.schedules import Schedule

    for path in ("t2v.generation.Linear", "t2v.generation.schedules.Linear"):
        built = from_config({"class_path": path, "init_args": {"start": 4.0, "stop": 1.0}}, Schedule)
        assert isinstance(built, Linear)


@pytest.mark.parametrize("class_path", ["os.system", "subprocess.Popen", "t2v.errors.UserError"])
def test_code_that_is_not_a_subclass_is_refused(class_path):
    with pytest.raises(UserError, match=rf"class_path={class_path} is not a known Shape: .*Square"):
        from_config({"class_path": class_path, "init_args": {}}, Shape)


def test_an_abstract_class_is_refused():
    path = to_config(Square(1.0))["class_path"].replace("Square", "Shape")
    with pytest.raises(UserError, match="is not a known Shape"):
        from_config({"class_path": path}, Shape)


def test_a_nested_object_must_be_of_the_class_in_the_type_hint():
    config = to_config(Scaled(Square(1.0)))
    config["init_args"]["shape"] = {"class_path": "subprocess.Popen", "init_args": {"args": "ls"}}
    with pytest.raises(UserError, match=r"subprocess\.Popen is not a known Shape"):
        from_config(config, Shape)
