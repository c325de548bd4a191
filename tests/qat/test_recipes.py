import math
from dataclasses import replace

import pytest

from qgen_lab.qat.recipes import Recipe, qgen_pool, recipes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("optimizer", "lion"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("schedule", "cosine-ish"),
        ("milestones", (5, 3)),
        ("gamma", 0.0),
        ("cooldown", 0.1),
        ("augmentation", "none such"),
        ("keep", "best"),
        ("stop_at_loss", 0.0),
        ("precision", "float8"),
        ("sharpness_radius", -0.1),
        ("sharpness_radius", math.nan),
        ("average_codes_from", 1.0),
        ("average_codes_from", -0.1),
        ("average_codes_from", 0.5),  # with keep="lowest-train-loss"
        ("reestimate_batch_norm", 1),
    ],
)
def test_recipe_fields(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got"):
        replace(recipes["qgen-nin"], **{field: value})


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("optimizer", "adamw"),
        ("schedule", "cosine"),
        ("augmentation", "none"),
        ("keep", "last"),
        ("precision", "bfloat16"),
    ],
)
def test_unknown_names_list_the_known_ones(field, known):
    with pytest.raises(ValueError, match=f"one of .*'{known}'"):
        replace(recipes["qgen-nin"], **{field: "none such"})


def test_fields_that_exclude_each_other():
    averaged = Recipe(epochs=3, keep="last", average_codes_from=0.5)
    with pytest.raises(ValueError, match=r"average_codes_from must be .* stop_at_loss=None"):
        replace(averaged, stop_at_loss=0.1)
    with pytest.raises(ValueError, match=r"sharpness_radius must be .*'float16'"):
        replace(averaged, sharpness_radius=0.1, precision="float16")


def test_multi_step_needs_milestones():
    with pytest.raises(ValueError, match=r"milestones must be .* at least one"):
        Recipe(epochs=3, schedule="multi-step")


def test_published_recipes():
    # arXiv 2404.11769, B.1 and C.1.
    assert recipes["qgen-nin"] == Recipe(
        epochs=300,
        batch_size=128,
        optimizer="sgd",
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="multi-step",
        milestones=(100, 200),
        gamma=0.1,
    )
    assert recipes["qgen-resnet"].milestones == (80, 160)
    assert recipes["qgen-imagenet"].learning_rate == 0.01


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(KeyError, match=r"'qgen-vgg' is not known.*qgen-nin, qgen-resnet"):
        recipes["qgen-vgg"]
    assert recipes.get("qgen-vgg") is None


def test_the_pool_is_a_grid():
    pool = qgen_pool()
    assert len(pool) == len(set(pool)) == 27
    assert recipes["qgen-nin"] in pool
    assert {recipe.optimizer for recipe in pool} == {"sgd", "adam", "rmsprop"}
    assert {(recipe.epochs, recipe.milestones) for recipe in pool} == {(300, (100, 200))}
    for optimizer in ("sgd", "adam", "rmsprop"):
        cells = [recipe for recipe in pool if recipe.optimizer == optimizer]
        assert len({(recipe.learning_rate, recipe.weight_decay) for recipe in cells}) == 9
    short = qgen_pool(replace(recipes["digits-nin"], epochs=30, batch_size=64))
    assert {(recipe.epochs, recipe.batch_size) for recipe in short} == {(30, 64)}
