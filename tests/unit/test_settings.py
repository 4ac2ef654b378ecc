"""Settings: who wins, where a value came from, and what is said about a value that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lsp_server.settings import DEFAULT_PRESETS, SETTING_NAMES, Settings, load_settings


def changed(settings: Settings) -> dict[str, Any]:
    """Every value that is not the default."""
    default = Settings()
    return {
        name: getattr(settings, name) for name in SETTING_NAMES if getattr(settings, name) != getattr(default, name)
    }


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path


def test_defaults_are_those_of_the_design() -> None:
    settings, problems = load_settings()
    assert problems == []
    assert (settings.plan_max_new_tokens, settings.plan_repetition_penalty) == (16, 1.10)
    assert (settings.plan_max_time_gpu_s, settings.plan_max_time_cpu_s) == (12, 60)
    assert (settings.patch_max_new_tokens, settings.patch_repetition_penalty) == (192, 1.03)
    assert (settings.patch_tokens_per_function_token, settings.patch_extra_tokens) == (1.3, 64)
    assert (settings.patch_max_time_gpu_s, settings.patch_max_time_cpu_s) == (25, 180)
    assert (settings.surroundings_chars, settings.context_tokens) == (1200, 1024)
    assert (settings.ledger_retention_days, settings.ledger_max_bytes) == (30, 500_000_000)
    assert (settings.host, settings.port, settings.apply, settings.model) == ("127.0.0.1", 8765, "ask", "auto")
    assert list(settings.presets) == ["docstring", "type-hints", "error-handling", "simplify"]


def test_later_sources_win_and_each_value_knows_its_source(tmp_path: Path) -> None:
    toml = written(
        tmp_path / "planpatch.toml",
        'model = "one"\ncontext_tokens = 1\nport = 1\nhost = "one"\nstyle = "one"\n[plan]\nmax_new_tokens = 1\n',
    )
    written(tmp_path / "ws/pyproject.toml", '[tool.planpatch]\ncontext-tokens = 2\nstyle = "two"\n')
    settings, problems = load_settings(
        user_toml=toml,
        workspace=tmp_path / "ws",
        env={"CTX_LIMIT": "3", "PLANPATCH_HOST": "three", "PLANPATCH_PORT": "3", "UNRELATED": "3"},
        cli={"host": "four", "port": 4, "model": None},
        lsp={"port": 5, "plan": {"maxNewTokens": None}},
    )
    assert problems == []
    assert {name: (value, settings.source_of(name)) for name, value in changed(settings).items()} == {
        "model": ("one", f"{toml}: model"),
        "plan_max_new_tokens": (1, f"{toml}: plan.max_new_tokens"),
        "style": ("two", f"{tmp_path / 'ws' / 'pyproject.toml'}: tool.planpatch.style"),
        "context_tokens": (3, "environment variable CTX_LIMIT"),
        "host": ("four", "command line: --host"),
        "port": (5, "editor setting planpatch.port"),
    }
    assert settings.source_of("apply") == "default"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"QWEN_8BIT": "1"}, {"quantization": "int8"}),
        ({"QWEN_8BIT": "1", "QWEN_4BIT": "true"}, {"quantization": "nf4"}),
        ({"QWEN_8BIT": "0"}, {"quantization": "bf16"}),
        ({"QWEN_8BIT": "0", "QWEN_4BIT": "0"}, {"quantization": "bf16"}),
        ({"QWEN_4BIT": "0"}, {}),
        ({"QWEN_8BIT": "1", "PLANPATCH_QUANTIZATION": "fp32"}, {"quantization": "fp32"}),
        ({"TORCH_DTYPE": "bf16"}, {"dtype": "bfloat16"}),
        ({"TORCH_DTYPE": "torch.float16"}, {"dtype": "float16"}),
        ({"ADAPTER_PATH": "__none__"}, {"adapter": "__none__"}),
        ({"ADAPTER_PATH": "D:\\adapters\\mine"}, {"adapter": "D:\\adapters\\mine"}),
        ({"CTX_LIMIT": "2048"}, {"context_tokens": 2048}),
        ({"CTX_LIMIT": "2048", "PLANPATCH_CONTEXT_TOKENS": "4096"}, {"context_tokens": 4096}),
        ({"OLLAMA_CTX_CHARS": "800"}, {"surroundings_chars": 800}),
        ({"CLEAN_RESP": "0"}, {"clean_response": False}),
        ({"CLEAN_RESP": ""}, {}),
        ({"GEN_PLAN": '{"max_new_tokens": 24, "repetition_penalty": 1.2}'},
         {"plan_max_new_tokens": 24, "plan_repetition_penalty": 1.2}),
        ({"GEN_PATCH": '{"max_time": 9}'}, {"patch_max_time_gpu_s": 9.0, "patch_max_time_cpu_s": 9.0}),
        ({"GEN_PATCH": '{"do_sample": false, "temperature": 0.7, "top_p": 0.9}'}, {}),
        ({"GEN_PATCH": '{"do_sample": true, "temperature": 0.7}'}, {"patch_temperature": 0.7}),
        ({"GEN_PATCH": '{"do_sample": true, "top_p": 0.9}'}, {"patch_temperature": 1.0, "patch_top_p": 0.9}),
        ({"GEN_PLAN": '{"max_new_tokens": null}'}, {}),
        ({"PLANPATCH_LEDGER_MAX_BYTES": "1.5 GiB"}, {"ledger_max_bytes": 3 * 2**29}),
        ({"PLANPATCH_ORIGINS": "http://localhost:3000, https://a.example/"},
         {"origins": ("http://localhost:3000", "https://a.example")}),
        ({"PLANPATCH_HOME": "/x", "PLANPATCH_CONFIG": "/y", "PLANPATCH_TEST_HOME": "/z"}, {}),
    ],
)  # fmt: skip
def test_environment_variables_old_and_new(variables: dict[str, str], expected: dict[str, Any]) -> None:
    settings, problems = load_settings(env=variables)
    assert (changed(settings), problems) == (expected, [])


def test_an_origin_that_cannot_be_used_takes_no_other_with_it() -> None:
    """One bad word dropped the whole list."""
    variable = "http://a.example,*,b.example,chrome-extension://*,http://*,https://*:443,http://*.c.example:*"
    settings, problems = load_settings(env={"OLLAMA_ORIGINS": variable})
    assert settings.origins == ("http://a.example", "chrome-extension://*")
    [said] = [str(problem) for problem in problems]
    assert said.startswith("environment variable OLLAMA_ORIGINS: '*' is refused on purpose")
    for word in ("'b.example' is no origin", "'http://*' is refused", "'https://*:443' is refused"):
        assert word in said
    assert said.endswith("'http://*.c.example:*' has more than one *; the others stand.")
    assert settings.source_of("origins") == "environment variable OLLAMA_ORIGINS"


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"env": {"CTX_LIMIT": "many"}},
         "environment variable CTX_LIMIT: 'many' cannot be used: expected a number; the default stands."),
        ({"env": {"QWEN_8BIT": "maybe"}},
         "environment variable QWEN_8BIT: 'maybe' cannot be used: expected true or false."),
        ({"env": {"TORCH_DTYPE": "int3"}},
         "environment variable TORCH_DTYPE: 'int3' cannot be used:"
         " expected auto, bfloat16, float16 or float32; the default stands."),
        ({"env": {"GEN_PLAN": "[16]"}}, "environment variable GEN_PLAN: expected a JSON object; it is ignored."),
        ({"env": {"GEN_PATCH": '{"max_new_token": 3}'}},
         "environment variable GEN_PATCH: max_new_token: there is no such setting; did you mean patch_max_new_tokens?"),
        ({"cli": {"temperature": 1}},
         "command line: --temperature: there is no such setting; did you mean plan_temperature or patch_temperature?"),
        ({"cli": {"plan_tokens": 1}},
         "command line: --plan-tokens: there is no such setting; did you mean plan_max_new_tokens?"),
        ({"cli": {"patch_min_p": 1}}, "command line: --patch-min-p: there is no such setting."),
        ({"env": {"PLANPATCH_STYLE": "a\udcff"}},
         "environment variable PLANPATCH_STYLE:"
         " 'a\\udcff' cannot be used: expected text in UTF-8; the default stands."),
        ({"lsp": {"presets": {"a": "b\ud800"}}},
         "editor setting planpatch.presets: {'a': 'b\\ud800'} cannot be used: expected text in UTF-8; it is left out."),
        ({"env": {"PLANPATCH_MODLE": "x"}},
         "environment variable PLANPATCH_MODLE: there is no such setting; did you mean model?"),
        ({"cli": {"quantization": "int4"}},
         "command line: --quantization: 'int4' cannot be used:"
         " expected one of auto, int8, nf4, bf16, fp32; the default stands."),
        ({"cli": {"patch_max_new_tokens": 0}},
         "command line: --patch-max-new-tokens: 0 cannot be used:"
         " expected a whole number from 1 to 131072; the default stands."),
        ({"lsp": {"port": True}},
         "editor setting planpatch.port: True cannot be used: expected a number; the default stands."),
        ({"lsp": {"plan": {"maxNewTokens": 1.5}}},
         "editor setting planpatch.plan.maxNewTokens: 1.5 cannot be used:"
         " expected a whole number from 1 to 4096; the default stands."),
        ({"lsp": {"plan": 3}}, "editor setting planpatch.plan: there is no such setting."),
        ({"lsp": {"token": "a\nb"}}, "editor setting planpatch.token: expected text on one line; the default stands."),
        ({"lsp": {"origins": ["localhost"]}},
         "editor setting planpatch.origins: 'localhost' is no origin;"
         " expected scheme://host or scheme://host:port; the default stands."),
        ({"env": {"OLLAMA_ORIGINS": "*"}},
         "environment variable OLLAMA_ORIGINS: '*' is refused on purpose, because every web page could call then;"
         " write the pages that may, such as https://app.example or https://*.team.example; the default stands."),
        ({"lsp": {"presets": {"Bad Name": "x"}}},
         "editor setting planpatch.presets: {'Bad Name': 'x'} cannot be used: 'Bad Name' is no preset name;"
         " expected small letters, digits and hyphens, at most 40; it is left out."),
        ({"lsp": {"ledgerMaxBytes": "lots"}},
         "editor setting planpatch.ledgerMaxBytes: 'lots' cannot be used:"
         " expected a size such as 500MB; the default stands."),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_named_with_its_source(sources: dict[str, Any], said: str) -> None:
    settings, problems = load_settings(**sources)
    assert [str(problem) for problem in problems] == [said]
    assert changed(settings) == {}


def test_a_bad_value_leaves_the_one_below_it_and_says_which() -> None:
    settings, problems = load_settings(env={"CTX_LIMIT": "2048"}, cli={"context_tokens": "-1"})
    assert settings.context_tokens == 2048
    assert [problem.message for problem in problems] == [
        "'-1' cannot be used: expected a whole number from 0 to 131072; environment variable CTX_LIMIT stands."
    ]


def test_a_workspace_sets_presets_context_and_style_and_nothing_else(tmp_path: Path) -> None:
    written(
        tmp_path / "pyproject.toml",
        "[tool.planpatch]\nsurroundings_chars = 400\nstyle = 'Google docstrings 😀'\nmodel = 'evil/model'\nport = 1\n"
        "adapter = 'evil'\nroot = '/'\ncontext_token = 5\n"
        "[tool.planpatch.presets]\nlogging = 'Log every call.'\ndocstring = {title = 'Doc', intent = 'One line.'}\n"
        "[tool.planpatch.patch]\nmax_new_tokens = 4000\n",
    )
    settings, problems = load_settings(workspace=tmp_path)
    assert set(changed(settings)) == {"surroundings_chars", "style", "presets"}
    assert [(p.name, p.title, p.intent) for p in settings.presets.values() if p.name in ("logging", "docstring")] == [
        ("docstring", "Doc", "One line."),
        ("logging", "logging", "Log every call."),
    ]
    assert settings.presets["simplify"] == DEFAULT_PRESETS["simplify"]
    allowed = "surroundings_chars, context_tokens, style, presets, training_log"
    ignored = f"a workspace may not set this and it is ignored; it may set {allowed}."
    prefix = f"{tmp_path / 'pyproject.toml'}: tool.planpatch"
    assert sorted(str(problem) for problem in problems) == sorted(
        [
            *(f"{prefix}.{key}: {ignored}" for key in ("model", "port", "adapter", "root", "patch.max_new_tokens")),
            f"{prefix}.context_token: there is no such setting; did you mean context_tokens?",
        ]
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model = \n", "the file is not TOML: Invalid value"),
        (b"model = 'caf\xe9'\n", "the file is not UTF-8 (byte 12); nothing in it is used."),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_nothing_in_it_is_used(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "planpatch.toml"
    path.write_bytes(content)
    settings, problems = load_settings(user_toml=path)
    assert [problem.source for problem in problems] == [str(path)]
    assert problems[0].message.startswith(said)
    assert changed(settings) == {}


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "planpatch.toml").mkdir()
    _, problems = load_settings(user_toml=tmp_path / "planpatch.toml")
    assert [problem.message.split(":")[0] for problem in problems] == ["the file cannot be read"]


@pytest.mark.parametrize("text", ["", "\ufeffport = 1\r\n", "# no tool table\n[tool]\nplanpatch = 3\n"])
def test_files_with_a_bom_or_without_our_table_are_no_problem(tmp_path: Path, text: str) -> None:
    user = written(tmp_path / "planpatch.toml", text if "tool" not in text else "")
    written(tmp_path / "ws/pyproject.toml", text)
    _, problems = load_settings(user_toml=user, workspace=tmp_path / "ws")
    assert problems == []


def test_missing_files_are_no_problem(tmp_path: Path) -> None:
    assert load_settings(user_toml=tmp_path / "none.toml", workspace=tmp_path / "none") == (Settings(), [])


def test_a_file_that_is_named_and_missing_is_a_problem(tmp_path: Path) -> None:
    """A typo in PLANPATCH_CONFIG went unnoticed: the defaults were used without a word."""
    missing = tmp_path / "größe 🐍.toml"
    assert load_settings(user_toml=missing, env={"PLANPATCH_CONFIG": " "})[1] == []
    settings, problems = load_settings(user_toml=missing, env={"PLANPATCH_CONFIG": str(missing)})
    assert [str(problem) for problem in problems] == [
        f"environment variable PLANPATCH_CONFIG: the file {missing} does not exist; the defaults stand."
    ]
    assert settings == Settings()
    missing.touch()
    assert load_settings(user_toml=missing, env={"PLANPATCH_CONFIG": str(missing)})[1] == []


@pytest.mark.parametrize("as_json", [False, True])
def test_a_preset_that_cannot_be_used_takes_no_other_with_it(as_json: bool) -> None:
    table = {"good": "Say 🐍.", "Bad Name": "x", "empty": " ", "simplify": {"title": "Less", "intent": "Less code."}}
    sources = {"env": {"PLANPATCH_PRESETS": json.dumps(table)}} if as_json else {"lsp": {"presets": table}}
    settings, problems = load_settings(**sources)  # type: ignore[arg-type]
    assert [name for name in settings.presets if name not in DEFAULT_PRESETS] == ["good"]
    assert settings.presets["simplify"].intent == "Less code."
    assert [str(problem).partition(" cannot be used: ")[2] for problem in problems] == [
        "'Bad Name' is no preset name; expected small letters, digits and hyphens, at most 40; it is left out.",
        "preset 'empty': expected an intent of 1 to 1000 characters; it is left out.",
    ]


@pytest.mark.parametrize(("name", "expected"), [("model", "auto, a name of"), ("adapter", "an adapter folder, auto")])
def test_an_empty_name_says_what_may_stand_there(name: str, expected: str) -> None:
    for sources in ({"cli": {name: ""}}, {"lsp": {name: "  "}}):
        settings, problems = load_settings(**sources)  # type: ignore[arg-type]
        assert getattr(settings, name) == "auto"
        assert f"'{next(iter(next(iter(sources.values())).values()))}' cannot be used: expected {expected}" in str(
            problems[0]
        )


def test_the_report_names_sources_and_hides_the_token() -> None:
    settings, _ = load_settings(env={"PLANPATCH_TOKEN": "s3cret"}, cli={"port": 0})
    report = {row["name"]: (row["value"], row["source"]) for row in settings.report()}
    assert report["token"] == ("(set)", "environment variable PLANPATCH_TOKEN")
    assert report["port"] == (0, "command line: --port")
    assert report["origins"] == ([], "default")
    assert "s3cret" not in json.dumps(settings.report())
