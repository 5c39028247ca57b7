from pathlib import Path

import pytest
from stand_ins import OWN

from subquad.benchmark.mixers import load_user_mixer, parse_mixer, parse_mixers
from subquad.build import list_mixers, mixer_config


def test_a_name_may_have_options() -> None:
    assert parse_mixer("local:window=65").config == mixer_config("local", window=65)
    assert parse_mixer("local").config == mixer_config("local")
    assert [mixer.text for mixer in parse_mixers(" full, local:window=65 ,")] == ["full", "local:window=65"]


def test_a_class_in_a_file_of_the_users_own_joins_the_registry() -> None:
    mixer = parse_mixer(f"{OWN}:SoundConfig:scale=0.5")
    assert mixer.config.to_dict() == {"name": "sound", "scale": 0.5}
    assert "sound" in list_mixers()
    assert parse_mixer(f"{OWN}:SoundConfig:scale=0.5").config == mixer.config


def test_a_class_that_registered_itself_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses, subquad\nfrom subquad.mechanisms.local import LocalConfig\n"
        "@subquad.register('narrow')\n@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class MineConfig(LocalConfig):\n    window: int = 3\n"
    )
    assert load_user_mixer(path, "MineConfig") == "narrow"


def test_files_of_equal_name_are_different_files(tmp_path: Path) -> None:
    for folder, name in (("a", "OneConfig"), ("b", "TwoConfig")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"from subquad.mechanisms.full import FullConfig\nclass {name}(FullConfig):\n    pass\n"
        )
    assert load_user_mixer(tmp_path / "a" / "mine.py", "OneConfig") == "one"
    assert load_user_mixer(tmp_path / "b" / "mine.py", "TwoConfig") == "two"


def test_what_the_users_file_prints_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from subquad.mechanisms.full import FullConfig\nprint('hello')\nclass Mine(FullConfig): pass\n")
    load_user_mixer(path, "Mine")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected mixers separated by commas"),
        (" , ", r"expected mixers separated by commas"),
        ("locl", r"unknown token mixer 'locl'; did you mean 'local'\?"),
        ("local:windw=9", r"unknown option 'windw'; did you mean 'window'\?"),
        ("local:window", r"expected options as name=value behind a colon, got 'window'"),
        ("local:", r"expected options as name=value behind a colon, got ''"),
        ("local:window=wide", r"option 'window' must be int, got 'wide'"),
        ("local:window=9.5", r"option 'window' must be int, got 9.5"),
        ("local:window=true", r"option 'window' must be int, got True"),
        ("local:window=0", r"window counts the keys a token sees, itself included; got 0"),
        ("full,full", r"mixer 'full' is named twice"),
        ("local,local:window=129", r"mixer 'local:window=129' is named twice"),
        ("nowhere.py:MyConfig", r"nowhere\.py: no such file"),
        (f"{OWN}", r"name the config class in the file, as .*own_mechanisms\.py:MyConfig"),
        (f"{OWN}:SondConfig", r"no class 'SondConfig' .*did you mean 'SoundConfig'\?"),
        (f"{OWN}:NoConfig", r"no class 'NoConfig' derived from subquad.MixerConfig"),
        (f"{OWN}:FullConfi", r"no class 'FullConfi' (?!.*'FullConfig').*SoundConfig"),
        (f"{OWN}:UnfinishedConfig", r"UnfinishedConfig is incomplete: it needs build, cost, traits"),
        (f"{OWN}:SoundConfig:scal=1", r"unknown option 'scal'; did you mean 'scale'\?"),
    ],
)
def test_what_can_not_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mixers(text)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("class Mine(\n", r"running the file failed: SyntaxError: .*mine\.py, line 1"),
        ("import nowhere_to_be_found", r"running the file failed: ModuleNotFoundError: .*nowhere_to_be_found"),
        ("raise SystemExit(3)", r"running the file failed: SystemExit: 3"),
        (
            "from subquad.mechanisms.full import FullConfig\nclass LocalConfig(FullConfig): pass",
            r"the name 'local' is taken by .*; choose another",
        ),
        (
            "from subquad.mechanisms.full import FullConfig\nclass LocalConfig(FullConfig):\n"
            "    name = 'mine'\n    def __init__(self, x): pass",
            r"LocalConfig",
        ),
    ],
)
def test_a_file_that_does_not_run_says_why(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        parse_mixer(f"{tmp_path / 'mine.py'}:LocalConfig")


@pytest.mark.parametrize(
    "body", ["    def __init__(self, width): pass", "    @property\n    def traits(self): return self.nothing"]
)
def test_a_config_that_can_not_be_made_says_why(tmp_path: Path, body: str) -> None:
    (tmp_path / "mine.py").write_text(
        f"from subquad.mechanisms.full import FullConfig\nclass MineConfig(FullConfig):\n{body}\n"
    )
    with pytest.raises(ValueError, match=r"mine\.py:MineConfig: the config can't be made: (Type|Attribute)Error"):
        parse_mixer(f"{tmp_path / 'mine.py'}:MineConfig")


@pytest.mark.parametrize("text", ["full,reformer:chunk=16,rounds=2", "rounds=2"])
def test_options_behind_commas_are_explained(text: str) -> None:
    with pytest.raises(ValueError, match="'rounds=2': each option stands behind a colon, as in reformer:chunk=16:rou"):
        parse_mixers(text)
    with pytest.raises(ValueError, match="each option stands behind a colon"):
        parse_mixer(text)


@pytest.mark.parametrize("text", ["", " , "])
def test_an_empty_name_is_not_every_mechanism(text: str) -> None:
    with pytest.raises(ValueError, match="expected mixers separated by commas, such as full,local:window=65; got"):
        parse_mixers(text)


def test_a_list_among_the_options_stands_in_brackets() -> None:
    full, longformer, linformer = parse_mixers("full,longformer:dilation=[1,2],linformer:rank=[16, 32]:sharing=none")
    assert full.text == "full"
    assert longformer.config == mixer_config("longformer", dilation=(1, 2))
    assert linformer.config == mixer_config("linformer", rank=(16, 32), sharing="none")
    assert parse_mixers(f"{longformer.text},{linformer.text}") == [longformer, linformer]
