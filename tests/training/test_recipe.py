import pytest
from jsonargparse import ArgumentParser

from t2v.errors import UserError
from t2v.losses.term import LossTerm
from t2v.training.recipe import RecipeFile


@pytest.fixture
def parse():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=RecipeFile)
    for name in ("a", "b.x", "b.y"):
        parser.add_argument(f"--{name}", type=int, default=0)

    def parse(*args):
        parsed = parser.parse_args(list(map(str, args)))
        return parsed.a, parsed.b.x, parsed.b.y

    return parse


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return path

    return write


def test_a_file_overrides_its_base_and_the_bases_base(parse, write):
    write("general.yaml", "a: 1\nb: {x: 2, y: 3}\n")
    write("inner/middle.yaml", "base: ../general.yaml\nb: {x: 4}\n")
    last = write("last.yaml", "base: inner/middle.yaml\na: 5\n")
    assert parse("--config", last) == (5, 4, 3)


def test_flags_and_later_files_override_a_file_with_a_base(parse, write):
    write("general.yaml", "a: 1\nb: {x: 2, y: 3}\n")
    recipe, overlay = write("recipe.yaml", "base: general.yaml\nb: {y: 6}\n"), write("overlay.yaml", "b: {x: 7}\n")
    assert parse("--config", recipe, "--config", overlay, "--a", 9) == (9, 7, 6)


def test_an_item_of_a_list_has_no_arguments_of_an_earlier_files_item(write):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=RecipeFile)
    parser.add_argument("--terms", type=list[LossTerm])
    item = "terms: [{{class_path: t2v.losses.L1Loss, init_args: {{{}}}}}]\n"
    first = write("first.yaml", item.format("weight: 0.5"))
    second = write("second.yaml", item.format("start_step: 3"))
    based = write("based.yaml", "base: first.yaml\n" + item.format("start_step: 3"))
    for arguments in (["--config", str(first), "--config", str(second)], ["--config", str(based)]):
        (term,) = parser.parse_args(arguments).terms
        assert (term.init_args.weight, term.init_args.start_step) == (1.0, 3)


def test_a_key_that_a_file_has_twice_is_refused(parse, write):
    path = write("twice.yaml", "b:\n  x: 1\na: 2\nb: {y: 3}\n")
    with pytest.raises(UserError, match=r"twice.yaml has the key b in line 1 and in line 4: put all below it in one"):
        parse("--config", path)
    with pytest.raises(UserError, match="has the key a in line 1 and in line 1"):
        parse("--config", write("inline.yaml", "{a: 1, a: 2}\n"))
    merged = write("merged.yaml", "b: &one {x: 1}\n")
    assert parse("--config", merged) == (0, 1, 0)


def test_a_missing_base_and_a_circle_are_refused(parse, write):
    lost = write("lost.yaml", "base: nowhere.yaml\n")
    with pytest.raises(UserError, match=r"lost\.yaml is based on .*nowhere\.yaml, which is not there"):
        parse("--config", lost)
    first = write("first.yaml", "base: second.yaml\n")
    write("second.yaml", "base: first.yaml\n")
    with pytest.raises(UserError, match="again: remove one `base`"):
        parse("--config", first)


def test_a_config_given_as_text_is_read_as_before(parse):
    assert parse("--config", '{"a": 3}') == (3, 0, 0)
