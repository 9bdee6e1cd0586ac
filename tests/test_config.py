"""The configuration: TOML, --set, messages, hashes and origins."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from settings import BASE, DEFINING, LEAVES, NEEDED, PLACING, changed, toml, write

from raydistil import config as configuration
from raydistil.config import Config, all_keys, explain, flatten, load_config, merged, read_toml, result_hash
from raydistil.errors import ConfigError

JSON_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


def complaint(folder: Path, flat: dict[str, Any], *overrides: str) -> str:
    """What load_config says of a bad configuration, on its one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder / "c.toml", flat), list(overrides))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("config") / "base.toml", BASE)


@pytest.fixture(scope="module")
def base(base_file: Path) -> Config:
    return load_config(base_file, [])


def test_the_settings_name_every_leaf() -> None:
    keys = all_keys(Config)
    ends = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    lists = {"assistants", "ensemble"}
    assert {key for key in ends if key.partition(".")[0] not in lists} | lists == set(LEAVES)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("jobs/*.toml")), ids=lambda path: path.stem)
def test_every_shipped_job_loads(path: Path) -> None:
    assert len(result_hash(load_config(path, []))) == 16


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("distill.epochz", "distill.epochs"),
        ("finetune.epochz", "finetune.epochs"),
        ("corpuss.max_rows", "corpus"),
        ("tokens.lenght", "tokens.length"),
        ("distill.loss.temprature", "distill.loss.temperature"),
        ("nmae", "name"),
        ("distill.temperature", "distill.loss.temperature"),
        ("assistants", "assistants.layers"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path: Path, key: str, nearest: str) -> None:
    written = key.partition(".")[0] if key.startswith("corpuss") else key
    value: Any = 5
    if key == "assistants":
        written, value = "assistants.0.layrs", [{"layrs": [0]}]
    assert (
        complaint(tmp_path, BASE | {key: value}).removesuffix(" (and 1 more)")
        == f"unknown key {written}: did you mean {nearest}?"
    )


def test_an_unknown_key_far_from_all_lists_its_section(tmp_path: Path) -> None:
    assert (
        complaint(tmp_path, BASE | {"masking.zzz": 1}) == "unknown key masking.zzz: masking has kind, share, smoothing"
    )


def test_a_typo_of_a_required_key_is_named_before_the_missing_key(tmp_path: Path) -> None:
    flat = {key.replace("corpus.source", "corpus.sorce"): value for key, value in BASE.items()}
    assert complaint(tmp_path, flat) == "unknown key corpus.sorce: did you mean corpus.source? (and 1 more)"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("distill.epochs", "three", "distill.epochs: input should be a valid integer, got 'three'"),
        ("distill.epochs", "3", "distill.epochs: input should be a valid integer, got '3'"),
        ("distill.epochs", True, "distill.epochs: input should be a valid integer, got True"),
        ("distill.epochs", 0, "distill.epochs: input should be greater than or equal to 1, got 0"),
        ("name", 5, "name: input should be a valid string, got 5"),
        ("name", "a/b", "name: string should match pattern"),
        ("evaluate.no_teacher_baseline", "yes", "evaluate.no_teacher_baseline: input should be a valid boolean"),
        ("student.layers", [0, -1], "student.layers.1: input should be greater than or equal to 0, got -1"),
        ("corpus", "x" * 100, "corpus: input should be an object, got 'xxx"),
        ("cluster.teachers", [2, 1], "cluster.teachers: expected the fewest, then the most, got [2, 1]"),
        ("cluster.teachers", [1, 2, 3], "cluster.teachers: "),
        ("distill.betas", [0.9, 1.0], "distill.betas.1: input should be less than 1, got 1.0"),
        ("task", "qa", "task: input should be 'classification', 'regression', 'token_classification', "),
        ("tokens.buckets", [128], "tokens.buckets must lie below tokens.length = 128"),
        (
            "distill.micro_batch_tokens",
            127,
            "distill.micro_batch_tokens: expected at least tokens.length = 128, got 127: raise it, or cut texts",
        ),
        (
            "finetune",
            {"micro_batch_tokens": 128, "micro_batch_size": 8},
            "finetune: expected micro_batch_size or micro_batch_tokens, got both: leave one out",
        ),
        ("student.model", "small", "student: expected either layers, num_layers or a width (of the teacher) or model"),
        ("student.num_layers", 2, "student: expected either layers (a list) or num_layers (how many, chosen by rule)"),
        ("student.rule", "last", "student: rule chooses num_layers layers: set num_layers, or leave rule out"),
        (
            "student.rule",
            "some",
            "student.rule: input should be 'uniform', 'first', 'last' or 'every_other', got 'some'",
        ),
        ("student.narrow", "svd", "student: narrow says how a narrower student starts: set hidden_size, num_heads or "),
        ("student", {"family": "distilbert", "ffn_size": 8}, "student: family distilbert keeps the teacher's width"),
        (
            "distill.loss",
            {"kd": 0, "task": 0, "hidden": {"weight": 0}},
            "distill.loss: expected at least one of kd, task, cosine, hidden, pkd",
        ),
        (
            "distill.loss",
            {"schedule": {"pkd": {"linear": [1, 0]}}},
            "distill.loss: schedule.pkd: expected a schedule of a term that has a weight",
        ),
        ("distill.loss.schedule.kd.linear", [1], "distill.loss.schedule.kd.linear.1 is missing"),
        ("distill.loss.schedule.kd", {}, "distill.loss.schedule.kd: expected either linear = [from, to] or steps"),
        (
            "distill.loss.schedule.kd.steps",
            [[0.5, 1]],
            "distill.loss.schedule.kd: expected steps with ascending shares of the run, the first of them 0",
        ),
        (
            "distill.augment",
            {"join": 0.8, "cut": 0.3},
            "distill.augment: expected join + cut and mask + replace + drop",
        ),
        (
            "distill.loss.triplet",
            {"guided": True, "margin": 0.6},
            "distill.loss.triplet: expected largest_margin to be at least margin",
        ),
        (
            "distill",
            {"loss": {"divergence": "mse"}, "targets": {"codec": "topk"}},
            "distill.targets.codec topk goes with distill.loss.divergence forward_kl only, got mse: use codec hidden",
        ),
        (
            "distill.deepspeed",
            {"gradient_accumulation_steps": 4},
            "distill: deepspeed.gradient_accumulation_steps would ",
        ),
        ("finetune.deepspeed", {"train_batch_size": 4}, "finetune: deepspeed.train_batch_size would be another number"),
    ],
)
def test_a_wrong_value_is_named_with_what_came(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    flat = {name: kept for name, kept in BASE.items() if not name.startswith(f"{key}.")}
    assert complaint(tmp_path, flat | {key: value}).startswith(expected)


@pytest.mark.parametrize("text", ["inf", "nan", "-inf"])
def test_no_number_is_infinite_or_undefined(tmp_path: Path, text: str) -> None:
    assert complaint(tmp_path, BASE, f"distill.lr={text}").startswith("distill.lr: input should be ")


def test_a_missing_section_and_a_missing_key(tmp_path: Path) -> None:
    without_teacher = {key: value for key, value in BASE.items() if key != "teacher.model"}
    assert complaint(tmp_path, without_teacher) == "teacher is missing: add a section [teacher] to the file"
    expected = "teacher.model is missing: set it in the file or with --set teacher.model=..."
    assert complaint(tmp_path, without_teacher | {"teacher.precision": "float32"}) == expected


def test_a_file_that_is_not_there_or_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a TOML file, found none at"):
        load_config(tmp_path / "none.toml", [])
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: .* line 1"):
        load_config(tmp_path / "bad.toml", [])
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(ConfigError, match="0xe9"):
        load_config(tmp_path / "latin.toml", [])


@pytest.mark.parametrize("override", ["seed", "=1", " = 1", ""])
def test_an_override_without_key_or_value(override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set expects section\.key=value, got"):
        merged({}, [override])


def test_an_override_below_a_value(tmp_path: Path) -> None:
    message = complaint(tmp_path, BASE, "corpus.source.x=1")
    assert message == "--set corpus.source.x=1: source is a value, not a section"


@pytest.mark.parametrize("key", sorted(LEAVES))
def test_set_equals_the_file(tmp_path: Path, key: str) -> None:
    in_file = load_config(write(tmp_path / "changed.toml", changed(key)), [])
    start = {name: value for name, value in changed(key).items() if name != key}
    start |= {key: BASE[key]} if key in BASE else {}
    assert load_config(write(tmp_path / "start.toml", start), [f"{key}={toml(LEAVES[key])}"]) == in_file


@given(st.sampled_from(sorted(LEAVES)), JSON_VALUES)
def test_set_parses_what_the_file_would(key: str, value: Any) -> None:
    assert merged({}, [f"{key}={toml(value)}"]) == tomllib.loads(f"{key} = {toml(value)}")


@given(st.from_regex(r"[A-Za-z_./-][A-Za-z0-9_./:-]*", fullmatch=True))
def test_a_bare_word_is_a_string(word: str) -> None:
    known = {"true": True, "false": False}
    value = merged({}, [f"corpus.source={word}"])["corpus"]["source"]
    assert value == known.get(word, word) or word.lstrip("-") in ("inf", "nan")


@given(st.text())
def test_any_override_is_taken_or_refused_on_one_line(base_file: Path, override: str) -> None:
    try:
        load_config(base_file, [override])
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert "=" in override


def test_the_last_override_counts_and_dates_are_words(base_file: Path) -> None:
    config = load_config(base_file, ["seed=1", "seed=2", "name=2026-01-31", "output_dir=a=b"])
    assert (config.seed, config.name, config.output_dir) == (2, "2026-01-31", Path("a=b"))


def test_overrides_leave_the_tree_alone() -> None:
    tree = {"corpus": {"source": "x"}}
    merged(tree, ["corpus.source=y"])
    assert tree == {"corpus": {"source": "x"}}


@pytest.mark.parametrize("key", sorted(PLACING))
def test_placement_leaves_the_hash(tmp_path: Path, key: str) -> None:
    flats = changed(key), BASE | NEEDED.get(key, {})
    config, without = (load_config(write(tmp_path / "c.toml", flat), []) for flat in flats)
    assert config != without
    assert result_hash(config) == result_hash(without)


@pytest.mark.parametrize("key", sorted(DEFINING))
def test_everything_else_changes_the_hash(tmp_path: Path, base: Config, key: str) -> None:
    assert result_hash(load_config(write(tmp_path / "c.toml", changed(key)), [])) != result_hash(base)


def test_masks_of_a_row_change_the_hash_and_where_its_targets_are_kept_does_not(tmp_path: Path) -> None:
    def hashed(*overrides: str) -> str:
        return result_hash(load_config(write(tmp_path / "c.toml", BASE | {"task": "mlm"}), list(overrides)))

    anew, twice = hashed(), hashed("distill.targets.mask_variants=2")
    assert len({anew, twice, hashed("distill.targets.mask_variants=3")}) == 3
    assert twice == hashed("distill.targets.mask_variants=2", "distill.targets.cache=kept")
    once = hashed("distill.epochs=1", "distill.targets.mask_variants=1")
    assert once == hashed("distill.epochs=1", "distill.targets.cache=kept") != hashed("distill.epochs=1")


@pytest.mark.parametrize(
    ("task", "targets", "expected"),
    [
        (
            "mlm",
            {"cache": "kept"},
            "distill.targets.cache keeps the targets of each text, and every one of the 3 epochs has masks of its own: "
            "set distill.targets.mask_variants (such as 3), or distill.epochs=1",
        ),
        (
            "classification",
            {"mask_variants": 2, "augment.keep": 1.0},
            "distill.targets.mask_variants is of what is random in a text, which is nothing as this run is configured: "
            "leave it out",
        ),
        (
            "classification",
            {"cache": "kept", "codec": "sampled"},
            "distill.targets.cache keeps the targets of each text, and every one of the 6 epochs has augmented "
            "texts of its own (distill.augment.keep = 1 turns them off): set distill.targets.mask_variants (such as 4),"
            " or distill.general.epochs=1 and distill.epochs=1",
        ),
        (
            "classification",
            {"cache": "kept", "epochs": 1},
            "distill.targets.cache keeps the targets of each text, and every one of the 6 epochs has augmented "
            "texts of its own (distill.augment.keep = 1 turns them off): set distill.targets.mask_variants (such as 4),"
            " or distill.general.epochs=1",
        ),
    ],
)
def test_targets_that_cannot_be_kept_are_refused(
    tmp_path: Path, task: str, targets: dict[str, Any], expected: str
) -> None:
    apart = ("augment.keep", "epochs")
    flat = {f"distill.{'' if key in apart else 'targets.'}{key}": value for key, value in targets.items()}
    assert complaint(tmp_path, BASE | {"task": task} | flat).startswith(expected)


def test_a_cache_counts_the_epochs_in_which_something_is_drawn(tmp_path: Path) -> None:
    """In the general ones no soft labels are; and variants that one training needs are the run's."""
    drawn = {"distill.targets.codec": "sampled", "distill.targets.cache": "kept", "distill.augment.keep": 1.0}
    once = load_config(write(tmp_path / "c.toml", BASE | drawn | {"distill.epochs": 1}), [])
    assert once.drawn() == {"distill.general.epochs": (6, None), "distill.epochs": (1, "draws of its own")}
    some = {"task": "clm", "distill.loss.kd_positions": "sample", "distill.targets.mask_variants": 4}
    whole = {"assistants": [{"num_layers": 3, "epochs": 2, "loss": {"kd_positions": "all"}}]}
    chain = load_config(write(tmp_path / "c.toml", BASE | some | whole), [])
    assert [what for _, what in chain.drawn().values()] == [None, None, "sampled places of its own"]


def test_the_hash_is_the_same_in_every_process(base: Config) -> None:
    assert result_hash(base) == result_hash(Config.model_validate(base.model_dump()))
    assert configuration.digest({"b": [1, 2], "a": None}) == configuration.digest({"a": None, "b": (1, 2)})
    assert configuration.digest({"a": 1}) == "165b44bb3d3e0923"


def test_triple_is_distilberts_sum_but_for_what_is_set(tmp_path: Path) -> None:
    triple = BASE | {"task": "mlm", "distill.loss.triple": True, "distill.loss.cosine": 3.0}
    distill = load_config(write(tmp_path / "c.toml", triple), []).distill
    assert distill is not None
    loss = distill.loss
    assert (loss.kd, loss.temperature, loss.kd_positions, loss.task, loss.cosine) == (5, 2, "all", 2, 3)
    assert "did you mean distill.loss.triplet?" in complaint(tmp_path, BASE | {"distill.loss.triple": True})


@pytest.mark.parametrize(("key", "value"), [("masking.share", 0.3), ("distill.loss.kd_positions", "all")])
def test_what_is_of_language_models_is_refused_for_classes(tmp_path: Path, key: str, value: Any) -> None:
    assert "leave" in (said := complaint(tmp_path, BASE | {key: value})) and "classification" in said


@pytest.mark.parametrize(
    ("flat", "owner"),
    [
        ({"distill.loss.kd_sample": 0.1}, "distill.loss: kd_sample is of kd_positions = sample"),
        ({"distill.loss.beta": 0.1}, "distill.loss: beta is of divergence = jensen_shannon"),
        ({"distill.loss.triplet.largest_margin": 0.9}, "distill.loss.triplet: largest_margin is of guided = true"),
        (
            {"distill.loss.minilm.version": 1, "distill.loss.minilm.relation_heads": 2},
            "distill.loss.minilm: relation_heads is of version = 2",
        ),
        ({"distill.targets.top_k": 8}, "distill.targets: top_k is of codec = topk"),
        ({"distill.targets.codec": "topk", "distill.targets.num_draws": 8}, "distill.targets: num_draws is of codec ="),
        ({"task": "mlm", "masking.smoothing": 0.5}, "masking: smoothing is of kind = frequency"),
    ],
)
def test_a_setting_that_nothing_would_look_at_is_refused(tmp_path: Path, flat: dict[str, Any], owner: str) -> None:
    assert complaint(tmp_path, BASE | flat).startswith(owner)


def test_assistants_need_a_distillation(tmp_path: Path) -> None:
    flat = {key: value for key, value in BASE.items() if not key.startswith("distill")}
    said = complaint(tmp_path, flat | {"assistants": [{"num_layers": 3}]})
    assert said == "assistants are distilled: add a section [distill], or leave [[assistants]] out"


def test_explain_tells_every_origin(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", BASE | {"distill.deepspeed": {"a": {"b": 1}}})
    overrides = ["distill.lr=0.5", "finetune.deepspeed={c = 2}", "distill.epochs=9"]
    rows = explain(load_config(path, overrides), read_toml(path), overrides)
    origins = {key: (value, origin) for key, value, origin in rows}
    assert origins["distill.lr"] == (0.5, "--set")
    assert origins["distill.epochs"] == (9, "--set")
    assert origins["finetune.deepspeed.c"] == (2, "--set")
    assert origins["distill.deepspeed.a.b"] == (1, "file")
    assert origins["distill.loss.temperature"] == (8.0, "recipe")
    assert origins["finetune.epochs"] == (3, "file")
    assert origins["finetune.lr"] == (5e-5, "default")
    assert origins["cluster.students"] == (1, "default")


def test_explain_has_every_value_that_is_set(base: Config, base_file: Path) -> None:
    rows = explain(base, read_toml(base_file), [])
    assert {key: value for key, value, _ in rows} == flatten(base.model_dump(mode="json", exclude_none=True))
    assert {key for key, _, origin in rows if origin == "file"} == set(BASE)


@pytest.mark.parametrize(("name", "key"), [("evaluate", "batch_size"), ("export", "license")])
def test_without_a_distillation_there_is_no_student_to_score(tmp_path: Path, name: str, key: str) -> None:
    flat = {key: value for key, value in BASE.items() if not key.startswith(("distill", "evaluate", "export"))}
    said = complaint(tmp_path, flat | {f"{name}.{key}": 8 if name == "evaluate" else "mit"})
    assert said == f"{name} is of the student: add a section [distill], or leave [{name}] out"


@pytest.mark.parametrize("loss", [{"label_smoothing": 0.1}, {"divergence": "mse"}])
def test_what_is_a_mean_over_classes_is_none_over_places(tmp_path: Path, loss: dict[str, Any]) -> None:
    flat = {key: value for key, value in BASE.items() if not key.startswith("distill")}
    flat |= {"task": "question_answering", "distill": {"loss": loss}}
    assert complaint(tmp_path, flat).startswith(f"distill.loss.{next(iter(loss))}")
