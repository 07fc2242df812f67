import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from server.cli.options import (
    POSITIONAL,
    REPEATED,
    Between,
    Choice,
    Command,
    Count,
    Parsed,
    Program,
    ReadBy,
    Settings,
    Whole,
    to_toml_file,
)
from server.errors import ConfigError, EuryaleError


@dataclass(frozen=True)
class Part:
    index: int
    total: int

    def __str__(self) -> str:
        return f"{self.index}/{self.total}"


def read_part(text: str) -> Part:
    index, _, total = text.partition("/")
    if not total.isdecimal():
        raise ValueError("give I/N, such as 0/2")
    return Part(int(index), int(total))


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model.

    Attributes:
        model: Hub id or directory; 50% of users
            give `smollm2`.
        device: Where the model runs.
    """

    model: str = "smollm2"
    device: Literal["auto", "cpu"] = "auto"


@dataclass(frozen=True, kw_only=True)
class RunSettings(ModelSettings):
    """How a run goes.

    Attributes:
        data: Files with answers.
        limit: Number of conversations; all if not given.
        rate: Learning rate.
        top_k: Tokens kept; 0 is off.
        cache: Keep states in memory.
        overwrite: Drop what is there.
        tree_size: Nodes of a tree.
        temperatures: One per conversation.
        weights: Share by category.
        output: Where to write.
        part: Which part of how many.
        hidden: Never an option.

    Raises:
        ConfigError: If something does not fit.
    """

    data: Annotated[tuple[Path, ...], REPEATED]
    limit: Count | None = None
    rate: Annotated[float, Between(0.0, 1.0)] = 0.1
    top_k: Whole = 0
    cache: bool = True
    overwrite: bool = False
    tree_size: Literal["auto"] | Annotated[int, Between(1, 64)] = "auto"
    temperatures: tuple[Annotated[float, Between(0, 2)], ...] = (0.0,)
    weights: Mapping[str, float] | None = None
    output: Path | None = None
    part: Annotated[Part, ReadBy(read_part, "I/N")] = Part(0, 1)
    hidden: int = 7

    def __post_init__(self) -> None:
        if self.limit == 13:
            raise ConfigError("limit is 13; give another number")


@dataclass(frozen=True)
class Prompt:
    """The prompt.

    Attributes:
        prompt: What to say.
        raw: Leave it as it is.
    """

    prompt: Annotated[str, POSITIONAL]
    raw: bool = False


@dataclass(frozen=True, kw_only=True)
class Medusa:
    """Medusa.

    Attributes:
        num_heads: Draft heads.
        batch_size: Examples of a step.
    """

    num_heads: int = 4
    batch_size: int = 8


@dataclass(frozen=True, kw_only=True)
class Medusa2(Medusa):
    """Medusa 2.

    Attributes:
        rank: Of the adapter.
    """

    batch_size: int = 2
    rank: int = 16


@dataclass(frozen=True, kw_only=True)
class Mtp:
    """MTP.

    Attributes:
        num_depths: Depths that are unrolled.
    """

    num_depths: int = 4


@dataclass(frozen=True)
class Nested:
    """Nothing.

    Attributes:
        known: Known.
    """

    known: int = 1
    unknown: int = 2


METHOD = Choice("method", "What to train", {"a": Medusa, "b": Medusa2, "c": Mtp}, "a")
RUN = Command("run", "Run it.", dict, {"settings": Settings(RunSettings, without=["hidden"])})
SAY = Command(
    "say",
    "Say it.",
    lambda prompt, model: (prompt, model),
    {
        "prompt": Settings(Prompt),
        "model": Settings(ModelSettings, only=["model"], defaults={"device": "cpu"}),
    },
    "EURYALE",
)
TRAIN = Command(
    "train", "Train.", dict, {"settings": Settings(ModelSettings), "method": METHOD}, "EURYALE"
)
PROGRAM = Program("prog", "A program.", [RUN, SAY, TRAIN, Command("version", "Print it.", int)])
DATA = ["--data", "a.jsonl"]
DEFAULT = RunSettings(data=(Path("a.jsonl"),))


def parse(*argv: str, **environ: str) -> Parsed:
    return PROGRAM.parse(argv, environ)


def run_settings(*argv: str) -> Any:
    return parse("run", *DATA, *argv).arguments["settings"]


def toml(directory: Path, *lines: str) -> str:
    path = directory / "run.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def help_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        parse(*argv, "--help")
    return capsys.readouterr().out


class TestCommandLine:
    def test_without_options_the_defaults_are_the_dataclasses(self) -> None:
        assert run_settings() == DEFAULT

    def test_every_kind_of_value_arrives(self) -> None:
        found = run_settings(
            *["--data", "b", "--limit", "5", "--rate", "1e-3", "--top-k", "3", "--no-cache"],
            *["--overwrite", "--tree-size", "8", "--temperatures", "0, 0.5", "--part", "1/2"],
            *["--weights", "math=2,open qa=0.5", "--output=out", "--model", "m", "--device", "cpu"],
        )
        assert found == RunSettings(
            data=(Path("a.jsonl"), Path("b")),
            limit=5,
            rate=1e-3,
            top_k=3,
            cache=False,
            overwrite=True,
            tree_size=8,
            temperatures=(0.0, 0.5),
            weights={"math": 2.0, "open qa": 0.5},
            output=Path("out"),
            part=Part(1, 2),
            model="m",
            device="cpu",
        )

    def test_positional_arguments_and_several_dataclasses(self) -> None:
        parsed = parse("say", "hello there", "--raw", "--model", "m")
        assert parsed.command is SAY
        prompt = Prompt("hello there", raw=True)
        assert parsed.run() == (prompt, ModelSettings(model="m", device="cpu"))

    def test_a_command_may_have_no_options(self) -> None:
        assert parse("version").run() == 0
        with pytest.raises(ConfigError, match="unrecognized arguments: --config"):
            parse("version", "--config", "x")

    def test_defaults_of_a_command_win_over_the_dataclass(self) -> None:
        settings = Settings(RunSettings, only=["limit"], defaults={"limit": 3, "data": ()})
        program = Program("prog", "", [Command("run", "", dict, {"x": settings})])
        assert program.parse(["run"], {}).arguments["x"] == RunSettings(data=(), limit=3)
        found = program.parse(["run", "--limit", "4"], {}).arguments["x"]
        assert found == RunSettings(data=(), limit=4)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--limit", "0"], "--limit is '0'; give a whole number from 1"),
            (["--limit", "1.5"], "--limit is '1.5'; give a whole number from 1"),
            (["--limit", "1_0"], "--limit is '1_0'; give a whole number"),
            (["--rate", "2"], "--rate is '2'; give a number from 0 to 1"),
            (["--rate", "nan"], "--rate is 'nan'; give a number from 0 to 1"),
            (["--rate", "fast"], "--rate is 'fast'; give a number from 0 to 1"),
            (["--top-k", "-1"], "--top-k is '-1'; give a whole number from 0"),
            (["--tree-size", "many"], "--tree-size is 'many'; give auto or a whole number from 1"),
            (["--tree-size", "65"], "--tree-size is '65'; give auto or a whole number from 1 to"),
            (
                ["--temperatures", "0,3"],
                "--temperatures is '0,3'; give a number from 0 to 2, or se",
            ),
            (["--temperatures", ""], "--temperatures is ''; give a number"),
            (["--weights", "math"], "--weights is 'math'; give NAME=VALUE pairs, each value a num"),
            (["--weights", "math=x"], "--weights is 'math=x'; give NAME=VALUE pairs"),
            (["--part", "1"], "--part is '1'; give I/N, such as 0/2"),
            (["--device", "tpu"], "--device is 'tpu'; give auto or cpu"),
            (["--limit"], "argument --limit: expected one argument; prog run --help"),
            (["--no-cache=1"], "argument --cache.*; prog run --help"),
            (["--hidden", "1"], "unrecognized arguments: --hidden 1; .*prog run --help lists all"),
            (["--limt", "1"], "unrecognized arguments: --limt 1; did you mean --limit"),
            (["--lim", "1"], "unrecognized arguments: --lim 1; did you mean --limit"),
            (["more"], "unrecognized arguments: more; "),
            (["--limit", "13"], "limit is 13; give another number"),
        ],
    )
    def test_a_wrong_option_is_an_error_with_value_and_remedy(
        self, argv: list[str], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            run_settings(*argv)
        assert "\n" not in str(caught.value)

    def test_what_is_required_is_named(self) -> None:
        with pytest.raises(ConfigError, match="not given but required: --data"):
            parse("run")
        with pytest.raises(ConfigError, match="not given but required: PROMPT"):
            parse("say")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "no COMMAND is given; give one of run, say, train, version, or --help"),
            (["walk"], "argument COMMAND: invalid choice: 'walk'.*; prog --help"),
        ],
    )
    def test_a_wrong_command_is_an_error(self, argv: list[str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            parse(*argv)


class TestEnvironment:
    def test_a_variable_is_below_the_command_line(self) -> None:
        found = parse("say", "hi", EURYALE_MODEL="m").arguments["model"]
        assert found.model == "m"
        found = parse("say", "hi", "--model", "n", EURYALE_MODEL="m").arguments["model"]
        assert found.model == "n"

    def test_an_empty_variable_is_none_and_commands_without_a_prefix_read_none(self) -> None:
        assert parse("say", "hi", EURYALE_MODEL="").arguments["model"].model == "smollm2"
        assert parse("run", *DATA, EURYALE_MODEL="m").arguments["settings"] == DEFAULT

    @pytest.mark.parametrize("word", ["true", "1", "YES", "on"])
    def test_a_switch_is_a_word(self, word: str) -> None:
        assert parse("say", "hi", EURYALE_RAW=word).arguments["prompt"].raw
        assert not parse("say", "hi", "--no-raw", EURYALE_RAW=word).arguments["prompt"].raw
        assert not parse("say", "hi", EURYALE_RAW="off").arguments["prompt"].raw

    def test_a_wrong_variable_is_named(self) -> None:
        with pytest.raises(ConfigError, match="EURYALE_RAW is 'maybe'; give true or false"):
            parse("say", "hi", EURYALE_RAW="maybe")

    def test_positional_arguments_have_no_variable(self) -> None:
        with pytest.raises(ConfigError, match="PROMPT"):
            parse("say", EURYALE_PROMPT="hi")

    def test_a_repeated_option_has_one_value(self) -> None:
        command = replace(RUN, environment="X")
        found = Program("prog", "", [command]).parse(["run"], {"X_DATA": "a,b"})
        assert found.arguments["settings"].data == (Path("a,b"),)


class TestFile:
    def test_every_kind_of_value_arrives(self, tmp_path: Path) -> None:
        path = toml(
            tmp_path,
            'data = ["a.jsonl", "b"]',
            "limit = 5",
            "rate = 1",
            "top-k = 3",
            "cache = false",
            "tree-size = 8",
            "temperatures = [0, 0.7]",
            'part = "1/2"',
            'output = "out"',
            'device = "cpu"',
            "[weights]",
            "math = 2",
            '"open qa" = 0.5',
        )
        found = parse("run", "--config", path).arguments["settings"]
        assert found == RunSettings(
            data=(Path("a.jsonl"), Path("b")),
            limit=5,
            rate=1.0,
            top_k=3,
            cache=False,
            tree_size=8,
            temperatures=(0.0, 0.7),
            weights={"math": 2.0, "open qa": 0.5},
            output=Path("out"),
            part=Part(1, 2),
            device="cpu",
        )
        assert isinstance(found.rate, float)

    def test_one_value_needs_no_list(self, tmp_path: Path) -> None:
        path = toml(tmp_path, 'data = "a.jsonl"', "temperatures = 0.5", 'tree-size = "auto"')
        found = parse("run", "--config", path).arguments["settings"]
        assert found == replace(DEFAULT, temperatures=(0.5,))

    def test_command_line_and_environment_win_and_replace_lists(self, tmp_path: Path) -> None:
        path = toml(tmp_path, 'data = ["a", "b"]', "cache = false", "limit = 9")
        found = run_settings("--config", path, "--limit", "3", "--cache")
        assert found == replace(DEFAULT, limit=3)
        path = toml(tmp_path, 'model = "file"', "raw = true")
        parsed = parse("say", "hi", "--config", path, EURYALE_MODEL="variable")
        assert parsed.arguments["model"].model == "variable"
        assert parsed.arguments["prompt"].raw

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("limits = 3", "run.toml: unknown key 'limits'; did you mean limit"),
            ("top_k = 3", "run.toml: unknown key 'top_k'; did you mean top-k"),
            ("no-cache = true", "run.toml: unknown key 'no-cache'; did you mean cache"),
            ("zzz = 1", "run.toml: unknown key 'zzz'; --help lists all options"),
            ("help = true", "run.toml: unknown key 'help'"),
            ('config = "x"', "run.toml: unknown key 'config'"),
            ("hidden = 1", "run.toml: unknown key 'hidden'"),
            ("[train]", "run.toml: unknown key 'train'"),
            ('limit = "3"', "run.toml: limit is '3'; give a whole number from 1"),
            ("limit = 3.0", "run.toml: limit is 3.0; give a whole number"),
            ("limit = true", "run.toml: limit is True; give a whole number"),
            ("limit = [3]", r"run.toml: limit is \[3\]; give a whole number"),
            ("limit = 0", "run.toml: limit is 0; give a whole number from 1"),
            ("rate = nan", "run.toml: rate is nan; give a number from 0 to 1"),
            ("rate = false", "run.toml: rate is False; give a number"),
            ("cache = 1", "run.toml: cache is 1; give true or false"),
            ('cache = "yes"', "run.toml: cache is 'yes'; give true or false"),
            ("data = 7", "run.toml: data is 7; give a path, or several of them"),
            ('data = ["a", 7]', r"run.toml: data is \['a', 7\]; give a path"),
            ('device = "tpu"', "run.toml: device is 'tpu'; give auto or cpu"),
            ("device = [1]", r"run.toml: device is \[1\]; give auto or cpu"),
            ("model = 1", "run.toml: model is 1; give a string"),
            ("part = 1", "run.toml: part is 1; give I/N"),
            ('part = "1"', "run.toml: part is '1'; give I/N, such as 0/2"),
            ("temperatures = []", r"run.toml: temperatures is \[\]; give a number"),
            ("temperatures = [true]", r"run.toml: temperatures is \[True\]; give a number"),
            ('temperatures = "0,1"', "run.toml: temperatures is '0,1'; give a number"),
            ("weights = 3", "run.toml: weights is 3; give NAME=VALUE pairs"),
            ("weights = {math = 'x'}", "run.toml: weights is .*; give NAME=VALUE pairs"),
            ("limit 3", "run.toml cannot be read: Expected '='.*; give a TOML file"),
            ("limit = 3\nlimit = 4", "run.toml cannot be read: Cannot overwrite a value"),
        ],
    )
    def test_a_wrong_file_is_an_error_with_file_key_and_value(
        self, line: str, message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            run_settings("--config", toml(tmp_path, line))

    @pytest.mark.parametrize("content", [None, b"\xff\xfe"])
    def test_an_unreadable_file_is_named(self, content: bytes | None, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"run.toml cannot be read: .*; give a TOML file"):
            run_settings("--config", str(path))

    @pytest.mark.parametrize(
        "settings",
        [
            DEFAULT,
            replace(DEFAULT, limit=3, rate=1e-05, cache=False, tree_size=4, part=Part(1, 3)),
            replace(DEFAULT, temperatures=(0.0, 0.7), output=Path('odd "name\\ 你好\n\x7f')),
            replace(DEFAULT, weights={"math": 2.0, "open qa": 0.5, 'quo"te': 0.0, "": 1.0}),
        ],
    )
    def test_what_is_saved_is_read_again(self, settings: RunSettings, tmp_path: Path) -> None:
        path = toml(tmp_path, to_toml_file(RUN, {"settings": settings}))
        assert parse("run", "--config", path).arguments["settings"] == settings

    def test_saved_are_offered_fields_that_have_a_value(self) -> None:
        text = to_toml_file(RUN, {"settings": DEFAULT}, leave_out={"overwrite"})
        assert "top-k = 0\n" in text
        assert not re.search("^(limit|hidden|overwrite)", text, re.MULTILINE)

    def test_a_chosen_dataclass_is_saved_with_the_choice(self, tmp_path: Path) -> None:
        arguments = {"settings": ModelSettings(), "method": Medusa2(num_heads=2, rank=3)}
        path = toml(tmp_path, to_toml_file(TRAIN, arguments))
        assert parse("train", "--config", path).arguments == arguments


class TestChoice:
    def test_the_chosen_dataclass_has_its_own_options_and_defaults(self) -> None:
        assert parse("train").arguments["method"] == Medusa()
        assert parse("train", "--method", "b").arguments["method"] == Medusa2()
        found = parse("train", "--rank", "3", "--num-heads", "2", "--method", "b")
        assert found.arguments["method"] == Medusa2(num_heads=2, rank=3)
        assert parse("train", "--method", "c").arguments["method"] == Mtp()

    def test_file_and_environment_choose_too(self, tmp_path: Path) -> None:
        path = toml(tmp_path, 'method = "b"', "rank = 3")
        assert parse("train", "--config", path).arguments["method"] == Medusa2(rank=3)
        assert parse("train", EURYALE_METHOD="c").arguments["method"] == Mtp()

    def test_an_option_of_another_choice_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match="--num-depths is an option of --method c, not of --method a"
        ):
            parse("train", "--num-depths", "2")
        with pytest.raises(
            ConfigError, match="--num-heads is an option of --method a or b, not of --method c"
        ):
            parse("train", "--num-heads", "2", "--method", "c")
        path = toml(tmp_path, "rank = 2")
        with pytest.raises(ConfigError, match=r"run.toml: rank is an option of --method b, not"):
            parse("train", "--config", path)

    def test_a_variable_of_another_choice_is_ignored(self) -> None:
        assert parse("train", EURYALE_NUM_DEPTHS="2").arguments["method"] == Medusa()

    def test_the_choice_itself_is_checked(self) -> None:
        with pytest.raises(ConfigError, match="--method is 'z'; give a, b or c"):
            parse("train", "--method", "z")

    def test_without_a_default_it_is_required(self) -> None:
        command = replace(TRAIN, settings={"method": replace(METHOD, default=None)})
        with pytest.raises(ConfigError, match=r"required: --method; give a\|b\|c"):
            Program("prog", "", [command]).parse(["train"], {})


class TestHelp:
    def test_it_lists_the_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = help_text(capsys)
        assert "A program." in text
        for command in PROGRAM.commands:
            assert re.search(rf"^ +{command.name} +{command.summary}$", text, re.MULTILINE)

    def test_every_field_has_its_docstring_default_and_variable(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        text = help_text(capsys, "run")
        assert "usage: prog run [OPTION]...\n" in text
        assert "\nHow a run goes:\n" in text
        for line in (
            "--model TEXT Hub id or directory; 50% of users give smollm2. [default: smollm2]",
            "--device auto|cpu Where the model runs. [default: auto]",
            "--data PATH Files with answers. [required]",
            "--limit N Number of conversations; all if not given.\n",
            "--rate X Learning rate. [default: 0.1]",
            "--top-k N Tokens kept; 0 is off. [default: 0]",
            "--cache, --no-cache Keep states in memory. [default: true]",
            "--tree-size auto|N Nodes of a tree. [default: auto]",
            "--temperatures X,... One per conversation. [default: 0.0]",
            "--weights NAME=X,... Share by category.\n",
            "--part I/N Which part of how many. [default: 0/1]",
            "--config FILE TOML file",
        ):
            assert line in re.sub("(?<! ) +", " ", text)
        assert "hidden" not in text
        text = re.sub("(?<! ) +", " ", help_text(capsys, "say"))
        assert "usage: prog say [OPTION]... PROMPT\n" in text
        assert "PROMPT What to say. [required]" in text
        assert (
            "--model TEXT Hub id or directory; 50% of users give smollm2. [default: smollm2; "
            in text
        )
        assert "EURYALE_MODEL]" in text

    def test_options_that_depend_on_a_choice_stand_under_it(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = help_text(capsys, "train")
        assert re.search(
            r"What to train:\n +--method a\|b\|c .*\nWith --method a or b:\n +--num-heads .*"
            r"With --method b:\n +--rank .*With --method c:\n +--num-depths",
            text,
            re.DOTALL,
        )

    def test_a_default_that_depends_on_a_choice_is_said_for_each(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        @dataclass(frozen=True)
        class Wide(Medusa):
            """Medusa heads of another number."""

            num_heads: int = 7

        monkeypatch.setenv("COLUMNS", "200")
        settings = {"method": Choice("method", "What to train.", {"a": Medusa, "w": Wide}, "a")}
        program = Program("prog", "", [Command("train", "", dict, settings)])
        with pytest.raises(SystemExit):
            program.parse(["train", "--help"], {})
        first = Medusa().num_heads
        assert f"[default: {first} with a, 7 with w]" in capsys.readouterr().out
        assert program.parse(["train", "--method", "w"], {}).arguments["method"] == Wide()

    def test_a_field_without_documentation_is_a_mistake_of_ours(self) -> None:
        program = Program("prog", "", [Command("x", "", dict, {"x": Settings(Nested)})])
        with pytest.raises(ValueError, match="Nested documents no attribute unknown"):
            program.parse(["x"], {})
        command = Command("x", "", dict, {"x": Settings(Nested, only=["known"])})
        assert Program("prog", "", [command]).parse(["x"], {}).arguments["x"] == Nested()

    def test_two_options_of_one_name_are_a_mistake_of_ours(self) -> None:
        settings = {"x": Settings(ModelSettings), "y": Settings(ModelSettings)}
        program = Program("prog", "", [Command("x", "", dict, settings)])
        with pytest.raises(Exception, match="conflicting option string"):
            program.parse(["x"], {})


def test_an_error_of_ours_in_a_reader_keeps_its_message() -> None:
    def refuse(text: str) -> Any:
        raise EuryaleError(f"no {text}")

    @dataclass
    class Refusing:
        """Refuses.

        Attributes:
            x: Whatever.
        """

        x: Any = None

    Refusing.__annotations__["x"] = Annotated[str, ReadBy(refuse, "X")] | None
    program = Program("prog", "", [Command("x", "", dict, {"x": Settings(Refusing)})])
    with pytest.raises(EuryaleError, match=r"^no thanks$"):
        program.parse(["x", "--x", "thanks"], {})


def test_intervals_say_what_they_take() -> None:
    assert str(Between(1)) == "from 1"
    assert str(Between(0, 2)) == "from 0 to 2"
    assert str(Between(0, excludes_low=True)) == "above 0"
    assert str(Between(0, 1, excludes_low=True)) == "above 0 and at most 1"
    assert Between(0, 1).allows(0)
    assert not Between(0, excludes_low=True).allows(0)
    assert not Between(0).allows(float("inf"))
    assert not Between(0).allows(float("nan"))
