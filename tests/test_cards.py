"""Cards: valid for the Hub, every figure from the records, and no claim that the records do not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult as HubResult
from huggingface_hub import ModelCard

from tffd_zoo.cards import CardsConfig, main, marks, render_results, render_students, render_suite
from tffd_zoo.data import ImageSpec
from tffd_zoo.evaluation import EvalResult
from tffd_zoo.model_card import CITATION, CardInfo, Twin, known_twin, render_card
from tffd_zoo.models import Metrics, PlainTwin, Release, Training, WheelFile
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, RunConfig, vary
from tffd_zoo.tasks import CANONICAL, KDConfig, TeacherConfig, method_tag

ROOT = Path(__file__).parents[1]
MODEL_CARD = ROOT / "MODEL_CARD.md"
TFFD = Recipe(
    name="tffd",
    model="tffd_resnet20",
    data=DataConfig(source="cifar100"),
    optim=OptimConfig(epochs=240, batch_size=64, lr=0.05, weight_decay=5e-4),
    tffd=CANONICAL,
    run=RunConfig(precision="no"),
)
PLAIN = vary(TFFD, "plain", tffd=None)
EVALUATION = {"split": "test", "revision": "abc123", "held_out": 0}
METRICS = {
    **EvalResult(10_000, 6_912, 9_134, {"top1": 69.12, "top5": 91.34, "nll": 1.2345, "ece": 5.67}, 4.0).to_json(),
    "params": 278_324,
    "macs": 40_818_944,
    "weights": "last",
    "weights_epoch": 240.0,
    "trained_epochs": 240.0,
    "evaluation": EVALUATION,
}
CONFIG = {
    "architecture": "tffd_resnet20",
    "num_classes": 100,
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    },
}
ENVIRONMENT = {"hardware": "abacus, 2 wires", "packages": {"torch": "2.14", "timm": "1.0.31"}, "processes": 2}


def card_info(recipe: Recipe = TFFD, **changes: Any) -> CardInfo:
    tag = "_".join(filter(None, [method_tag(recipe.to_dict()), "c100"]))
    return CardInfo("tffd_resnet20", tag, CONFIG, recipe.to_dict(), METRICS, **changes)


def twin(top1: float, **changes: Any) -> Twin:
    recipe = vary(PLAIN, "plain", **changes)
    return Twin("tffd_resnet20.ce_c100", recipe.to_dict(), METRICS | {"top1": top1})


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n\n")[1].split("\n\n## ")[0]


# --- what the Hub reads -----------------------------------------------------------------------------------------------


def test_the_hubs_client_reads_back_what_the_records_say() -> None:
    data = ModelCard(render_card(card_info())).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "apache-2.0")
    assert data.datasets == ["uoft-cs/cifar100"]
    assert data.metrics == ["accuracy"]
    assert "tf-fd" in data.tags
    assert data.model_name == "tffd_resnet20.c100"
    common = {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": "uoft-cs/cifar100",
        "dataset_name": "CIFAR-100",
        "dataset_split": "test",
        "dataset_revision": "abc123",
        "metric_type": "accuracy",
    }
    assert data.eval_results == [
        HubResult(**common, metric_name="top-1 accuracy (%)", metric_value=69.12),
        HubResult(**common, metric_name="top-5 accuracy (%)", metric_value=91.34),
    ]


def test_a_data_set_that_is_not_on_the_hub_is_not_named_as_one() -> None:
    recipe = vary(TFFD, "digits", data={"source": "digits"})
    config = CONFIG | {"num_classes": 10}
    info = CardInfo("tffd_resnet20", "digits", config, recipe.to_dict(), METRICS)
    front = yaml.safe_load(render_card(info).split("---")[1])
    assert "datasets" not in front
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "scikit-learn's handwritten digits"


@pytest.mark.parametrize(("source", "datasets"), [("org/birds", ["org/birds"]), ("my birds", None)])
def test_a_data_set_of_the_users_own_is_called_what_the_recipe_calls_it(source: str, datasets: Any) -> None:
    card = render_card(card_info(vary(TFFD, "birds", data={"source": source})))
    assert ModelCard(card).data.get("datasets") == datasets
    assert f"trained on {source} with" in card


@pytest.mark.parametrize(
    ("source", "classes", "name"),
    [
        ("org/birds", 100, "org/birds"),
        ("birds", 200, "birds"),
        ("digits", 10, "scikit-learn's handwritten digits"),
        ("cifar100", 100, "CIFAR-100"),
        ("uoft-cs/cifar100", 100, "CIFAR-100"),
    ],
)
def test_a_presets_tag_does_not_make_other_data_cifar100(source: str, classes: int, name: str) -> None:
    recipe = vary(TFFD, "tffd", data={"source": source}).to_dict()
    card = render_card(CardInfo("tffd_resnet20", "c100", CONFIG | {"num_classes": classes}, recipe, METRICS))
    assert f"trained on {name} with" in card
    assert ("cifar100" in card) == (name == "CIFAR-100")


def test_the_plain_twin_is_not_tagged_as_distilled() -> None:
    assert "tf-fd" not in ModelCard(render_card(card_info(PLAIN))).data.tags


# --- what people read -------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_in_the_records_figures() -> None:
    summary = render_card(card_info()).split("# tffd_resnet20.c100\n\n")[1].split("\n\n")[0]
    assert "0.28 M parameters, 40.8 M multiply-adds at 32 x 32 pixels" in summary
    assert "lambda_intra 0.04, lambda_inter 0.05" in summary
    assert "Top-1 69.12 %: 6,912 of 10,000 images." in summary


def test_a_gradient_share_is_what_the_card_gives_as_the_strength() -> None:
    card = render_card(card_info(vary(TFFD, "share", tffd={"share_intra": 0.05})))
    assert "lambda_intra chosen by a gradient share of 5 %, lambda_inter 0.05" in card


def test_our_own_architecture_needs_our_import_and_timms_own_does_not() -> None:
    ours = section(render_card(card_info(repo="org/name@v1")), "Load it")
    assert "import tffd_zoo" in ours
    assert 'timm.create_model("hf-hub:org/name@v1", pretrained=True)' in ours
    assert "timm says `Unknown model` and transformers asks for a newer timm, which would not help" in ours
    assert "`sha256sum -c SHA256SUMS`" in render_card(card_info())
    timms = CardInfo("tffd_resnet18", "c100", CONFIG | {"architecture": "resnet18"}, TFFD.to_dict(), METRICS)
    assert "import tffd_zoo" not in section(render_card(timms), "Load it")
    assert "Unknown model" not in section(render_card(timms), "Load it")


def test_the_imagenet_recipe_on_someones_pets_claims_no_imagenet_and_needs_no_import_for_timms_own() -> None:
    recipe = vary(TFFD, "imagenet-tffd", data={"source": "pets"}).to_dict()
    config = CONFIG | {"architecture": "mobilenetv3_small_050", "num_classes": 2}
    card = render_card(CardInfo("mobilenetv3_small_050", "pets", config, recipe, METRICS, repo="org/cats"))
    dataset = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["dataset"]
    assert (dataset["type"], dataset["name"]) == ("pets", "pets")
    assert "imagenet-1k" not in card.lower()
    assert "in1k" not in card
    assert "import tffd_zoo" not in section(card, "Load it")


def test_the_twin_stands_beside_it_and_one_pair_of_runs_claims_nothing() -> None:
    results = section(render_card(card_info(twin=twin(68.62))), "Results")
    assert "| `tffd_resnet20.ce_c100` |   68.62 |" in results
    assert "0.50 points of top-1 above `tffd_resnet20.ce_c100`" in results
    assert "says nothing about significance" in results


def test_a_loss_is_reported_as_a_loss_and_no_difference_as_none() -> None:
    assert "0.88 points of top-1 below" in section(render_card(card_info(twin=twin(70.0))), "Results")
    assert "are level in top-1 with `tffd_resnet20.ce_c100`. That is one" in render_card(card_info(twin=twin(69.123)))


def test_a_twin_of_another_recipe_is_called_that() -> None:
    results = section(render_card(card_info(twin=twin(60.0, optim={"epochs": 15}, run={"seed": 1}))), "Results")
    assert "The two runs also differ in epochs, seed, so it is not the effect of one change." in results
    assert "differ" not in section(render_card(card_info(twin=twin(60.0))), "Results").replace("difference", "")


def test_without_a_twin_no_gain_is_claimed() -> None:
    results = section(render_card(card_info()), "Results")
    assert "no gain by Tf-FD is claimed" in results
    assert "above" not in results


def test_the_curve_is_shown_only_where_there_is_one() -> None:
    assert "](curves.png)" in section(render_card(card_info(has_curves=True)), "Curves")
    assert "curves.png" not in render_card(card_info())


def test_how_it_was_trained_is_told_from_recipe_and_environment() -> None:
    training = section(render_card(card_info(environment=ENVIRONMENT)), "How it was trained")
    assert "recipe `tffd`: 240 epochs, batch 64 on each of 2 processes" in training
    assert "learning rate 0.05 (multistep, x0.1 at epochs 150, 180, 210), weight decay 0.0005" in training
    assert "seed 0, one run; precision float32" in training
    assert "hardware: abacus, 2 wires" in training
    hours = section(render_card(card_info(environment=ENVIRONMENT | {"hours": 0.72})), "How it was trained")
    assert "hardware: abacus, 2 wires, 0.72 hours (wall-clock" in hours
    assert "versions: torch 2.14, timm 1.0.31" in training


def test_every_change_of_the_images_is_told() -> None:
    recipe = vary(TFFD, "hard", data={"auto_augment": "trivial"}, optim={"mixup": 0.2, "cutmix": 1.0})
    for trained, words in (
        (TFFD, "`pad_crop_flip`; split"),
        (recipe, "`pad_crop_flip`, `trivial`, mixup 0.2, cutmix 1;"),
    ):
        assert f"augmentation {words}" in section(render_card(card_info(trained)), "How it was trained")


def test_a_run_that_was_cut_short_is_said_to_be() -> None:
    info = replace(card_info(), metrics=METRICS | {"weights_epoch": 0.32, "trained_epochs": 0.32})
    assert "240 epochs (stopped after 0.32)" in section(render_card(info), "How it was trained")
    assert "|   0.32 |" in section(render_card(info), "Results")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (PLAIN, "trained on CIFAR-100 with cross-entropy alone."),
        (
            vary(TFFD, "kd", teacher=TeacherConfig(model="tffd_resnet110.ce_c100", lambda_features=0, kd=KDConfig())),
            "lambda_inter 0.05) and logits of a second network (`tffd_resnet110.ce_c100`, offline).",
        ),
        (vary(PLAIN, "branches", teacher=TeacherConfig(paradigm="branches")), "a second network (branches of its own"),
    ],
)
def test_what_taught_it_is_said_in_words(recipe: Recipe, words: str) -> None:
    assert words in render_card(card_info(recipe))


def test_the_evaluation_can_be_repeated_from_the_card() -> None:
    evaluation = section(render_card(card_info(repo="org/name")), "How it was evaluated")
    assert "10,000 images, split `test` of CIFAR-100, each once" in evaluation
    assert "`python -m tffd_zoo.eval hf-hub:org/name --data uoft-cs/cifar100 --split test`" in evaluation
    assert "weights of the last epoch (240)" in evaluation


def best(recipe: Recipe, **evaluation: Any) -> str:
    metrics = METRICS | {"weights": "best_ema", "weights_epoch": 200.0, "evaluation": EVALUATION | evaluation}
    return render_card(replace(card_info(recipe), metrics=metrics))


def test_figures_of_some_of_the_classes_are_said_to_be() -> None:
    for classes, said in ((97, "10,000 images of 97 of its 100 classes, split"), (100, "10,000 images, split")):
        evaluation = {**EVALUATION, "classes": classes, "model_classes": 100}
        info = replace(card_info(), metrics={**METRICS, "evaluation": evaluation})
        assert said in render_card(info)


def test_a_best_epoch_chosen_on_its_own_test_is_said_to_flatter() -> None:
    holdout = vary(TFFD, "holdout", data={"holdout": 5_000})
    flatters = "chosen on the very images that the figures are from"
    assert "moving average of the weights of the best epoch (200), chosen by top-1" in best(TFFD)
    assert flatters in section(best(TFFD), "What was not shown")
    assert flatters in best(holdout, split="train", held_out=5_000)
    assert flatters not in best(holdout, split="test")
    assert flatters not in render_card(card_info())


def test_figures_from_the_images_of_the_training_are_said_to_be() -> None:
    says = "The figures are from images that it was trained on"
    assert says in section(best(vary(TFFD, "same", data={"train_split": "test"})), "What was not shown")
    assert says not in best(TFFD)
    assert says not in best(vary(TFFD, "holdout", data={"holdout": 5_000}), split="train", held_out=5_000)


def test_held_out_images_are_called_that_and_no_command_promises_to_repeat_them() -> None:
    evaluation = section(
        best(vary(TFFD, "h", data={"holdout": 5_000}), split="train", held_out=5_000), "How it was evaluated"
    )
    assert "images held out of split `train`" in evaluation
    assert "Repeat it" not in evaluation


@pytest.mark.parametrize("info", [card_info(), card_info(PLAIN), card_info(twin=twin(60.0))])
def test_every_card_says_what_was_not_shown_and_whom_to_cite(info: CardInfo) -> None:
    card = render_card(info)
    assert "One run with one seed: no mean, no spread, no significance." in section(card, "What was not shown")
    assert "10.1007/978-3-031-19809-0_20" in section(card, "Licence and citation")
    for boast in ("state of the art", "state-of-the-art", "outperform", "significantly", "superior"):
        assert boast not in card.lower()


def test_a_run_shorter_than_the_literatures_is_said_to_be() -> None:
    short = CardInfo("tffd_resnet20", "c100", CONFIG, TFFD.to_dict(), METRICS | {"trained_epochs": 15.0})
    assert "15 epochs, where the literature's figures on CIFAR-100 are mostly from 240" in render_card(short)
    assert "the literature's figures" not in render_card(card_info())


# --- the zoo's own card -----------------------------------------------------------------------------------------------


def release(tag: str, correct1: int, recipe: Recipe) -> Release:
    figures = {"top1": correct1 / 100, "top5": 90.0, "nll": 1.25, "ece": 4.5}
    return Release(
        architecture="tffd_resnet20",
        tag=tag,
        file=WheelFile(Path("weights.safetensors")),
        size=1,
        sha256="0" * 64,
        input=ImageSpec((3, 32, 32), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0),
        label_set="cifar100",
        label_names=("ant", "bee"),
        license="apache-2.0",
        recipe=recipe.to_dict(),
        metrics=Metrics("uoft-cs/cifar100", "test", EvalResult(10_000, correct1, 9_000, figures)),
        training=Training(15, 0.75, 0, "abacus, 2 wires"),
    )


def test_the_zoos_table_has_the_manifests_figures_and_the_difference_between_twins() -> None:
    block = render_results([release("c100", 6_850, TFFD), release("ce_c100", 6_870, PLAIN)])
    row = next(line for line in block.splitlines() if line.startswith("| `tffd_resnet20.c100`"))
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    assert cells[:4] == ["`tffd_resnet20.c100`", "Tf-FD", "uoft-cs/cifar100, test", "32"]
    assert cells[4:] == ["68.50", "90.00", "1.2500", "4.50", "15", "0.75", "the package"]
    assert "- `tffd_resnet20.c100`: 0.20 points of top-1 below `tffd_resnet20.ce_c100`. That is one run" in block
    assert "- trained on: abacus, 2 wires" in block


def test_a_twin_that_is_not_released_is_told_by_the_entry_of_the_run() -> None:
    told = PlainTwin(PLAIN.to_dict(), release("ce_c100", 6_870, PLAIN).metrics)
    entry = replace(release("c100", 6_850, TFFD), plain_twin=told)
    assert (
        "- `tffd_resnet20.c100`: 0.20 points of top-1 below `tffd_resnet20.ce_c100`, which is not released. That is"
    ) in render_results([entry])
    shown = cells_of(render_students([entry], {}), "tffd_resnet20.c100")
    assert shown[2:5] == ["68.50 (68.70)", "4.50 (4.50)", "- (-)"]
    found = known_twin(entry.name, TFFD.to_dict(), [entry])
    assert found is not None
    assert found.recipe == PLAIN.to_dict()
    assert known_twin(entry.name, vary(TFFD, "tffd", run={"seed": 1}).to_dict(), [entry]) is None, "another run"
    released = known_twin(entry.name, TFFD.to_dict(), [entry, release("ce_c100", 6_880, PLAIN)])
    assert released is not None
    assert (released.metrics["top1"], released.released) == (68.8, True)
    assert known_twin("tffd_resnet20.ce_c100", PLAIN.to_dict(), [entry]) is None


def test_a_release_without_a_twin_claims_no_gain() -> None:
    assert "`tffd_resnet20.c100`: no plain twin was trained" in render_results([release("c100", 6_850, TFFD)])


def test_the_zoos_table_says_which_images_were_held_out_and_which_chose_the_weights() -> None:
    def entry(**evaluation: Any) -> Release:
        plain = release("c100", 6_850, TFFD)
        return replace(plain, metrics=replace(plain.metrics, evaluation=evaluation))

    flatters = "chosen on the very images"
    assert flatters not in render_results([entry(weights="last")])
    assert f"- `tffd_resnet20.c100`: The best epoch was {flatters}" in render_results([entry(weights="best")])
    assert "| uoft-cs/cifar100, test (images held out) |" in render_results([entry(held_out=5_000)])


def test_the_zoos_table_tells_a_moving_average_and_that_its_twin_is_none() -> None:
    averaged, plain = (
        release("c100", 6_850, vary(TFFD, "tffd", optim={"ema_decay": 0.99})),
        release("ce_c100", 6_870, PLAIN),
    )
    averaged = replace(averaged, metrics=replace(averaged.metrics, evaluation={"weights": "last_ema"}))
    block = render_results([averaged, plain])
    assert "- `tffd_resnet20.c100`: the moving average of the weights, decay 0.99\n" in block
    assert "`tffd_resnet20.ce_c100`: the moving average" not in block
    assert "Moving average of the weights: `tffd_resnet20.c100`. One run" in render_students([averaged, plain], {})
    assert "oving average" not in render_students([plain], {})
    assert "also differ in ema_decay, weights (last_ema and last), so it is not the effect of one change." in block


def test_the_command_replaces_the_figures_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    card = tmp_path / "CARD.md"
    card.write_text(f"before\n{marks('results')[0]}\nold figures\n{marks('results')[1]}\nafter\n")
    with pytest.raises(ValueError, match="not up to date with manifest and suite"):
        main(CardsConfig((card,), check=True))
    assert "old figures" in card.read_text()
    main(CardsConfig((card,)))
    assert card.read_text().startswith(f"before\n{marks('results')[0]}\n\n")
    assert card.read_text().endswith(f"\n\n{marks('results')[1]}\nafter\n")
    assert "old figures" not in card.read_text()
    main(CardsConfig((card,), check=True))


def test_a_card_without_a_place_for_the_figures_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    card = tmp_path / "CARD.md"
    card.write_text("nothing to see")
    with pytest.raises(ValueError, match="has no place for the figures"):
        main(CardsConfig((card,)))
    assert card.read_text() == "nothing to see"


def test_the_zoos_card_and_the_readme_have_the_figures_of_the_manifest_and_the_suite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    main(CardsConfig(check=True))
    assert all(mark in MODEL_CARD.read_text() for mark in (*marks("results"), *marks("suite")))
    assert all(mark in (ROOT / "README.md").read_text() for mark in marks("students"))


def test_the_zoos_card_cites_what_the_release_cards_cite() -> None:
    assert CITATION in MODEL_CARD.read_text()


SUITE: Any = {
    "clean": [{"model": "tffd_resnet20.c100", "top1": 68.5}, {"model": "tffd_resnet20.ce_c100", "top1": 68.7}],
    "calibration": [{"model": "tffd_resnet20.c100", "ece": 4.5}],
    "corruptions": [
        {"model": "tffd_resnet20.c100", "mean": 41.006, "images": 1000, "corrupted_images": "generated, seed 3"},
        {"model": "tffd_resnet20.ce_c100", "mean": 42, "images": 1000, "corrupted_images": "generated, seed 3"},
    ],
    "pairs": [
        {"part": "corruptions", "figure": "mean", "model": "tffd_resnet20.c100", "against": "tffd_resnet20.ce_c100"}
        | {"difference": -0.994, "low": -2, "high": 0.5},
        {"part": "corruptions", "figure": "mean", "model": "mean of 2 pairs", "against": None}
        | {"difference": -1, "low": -9, "high": 9},
    ],
}
"""What the suite wrote of two releases: figures to six digits, some parts not measured."""
TWINS = [release("c100", 6_850, TFFD), release("ce_c100", 6_870, PLAIN)]


def cells_of(table: str, start: str) -> list[str]:
    row = next(line for line in table.splitlines() if line.startswith(f"| `{start}`"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_students_stand_beside_their_twins_by_manifest_and_suite() -> None:
    table = render_students(TWINS, SUITE)
    assert cells_of(table, "tffd_resnet20.c100")[2:5] == ["68.50 (68.70)", "4.50 (4.50)", "41.01 (42.00)"]
    assert "`tffd_resnet20.ce_c100`" not in table
    assert "(1,000 images each, generated, seed 3)" in table
    assert "One run each; [what the runs show](recipes/results/README.md)" in table
    alone = render_students(TWINS[:1], {})
    assert cells_of(alone, "tffd_resnet20.c100")[2:5] == ["68.50 (-)", "4.50 (-)", "- (-)"]


def test_the_suites_figures_stand_with_their_intervals_and_what_they_do_not_say() -> None:
    block = render_suite(TWINS, SUITE)
    assert cells_of(block, "tffd_resnet20.c100")[1:] == ["4.50", "41.01", "-", "-", "-"]
    assert "- `tffd_resnet20.c100` minus `tffd_resnet20.ce_c100`: corrupted % -0.99 [-2.00, 0.50]" in block
    assert "-9.00" not in block
    assert "no difference here is shown to be an effect of Tf-FD" in block


def test_what_the_suite_measured_of_other_weights_is_left_out() -> None:
    again = [release("c100", 6_851, TFFD), TWINS[1]]  # released anew under the same name
    block = render_suite(again, SUITE)
    assert "`tffd_resnet20.c100`" not in block
    assert cells_of(block, "tffd_resnet20.ce_c100")[2] == "42.00"
    assert cells_of(render_students(again, SUITE), "tffd_resnet20.c100")[4] == "- (42.00)"
    assert "No weights" in render_suite(again[:1], SUITE)
