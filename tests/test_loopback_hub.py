"""The loopback Hub against its real clients: huggingface_hub, its `hf` command, `datasets` and timm."""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from loopback_hub import HURRY, LoopbackHub

MEBIBYTE = 1024**2


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


def ask(hub: LoopbackHub, cache: Path, code: str, **env: Any) -> Any:
    """Run a client program that ends with `show(value)`; returns that value."""
    prelude = """
    import json, sys
    from huggingface_hub import *
    from huggingface_hub.errors import *
    api = HfApi()
    def show(value):
        print(json.dumps(value))
    def failure(call, *args, **options):
        try:
            call(*args, **options)
        except Exception as error:
            return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
    """
    done = hub.python(["-c", HURRY + dedent(prelude) + dedent(code)], cache, **env)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def test_files_come_back_as_they_went_up_and_an_unchanged_commit_is_not_repeated(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    (tmp_path / "up" / "deep").mkdir(parents=True)
    (tmp_path / "up" / "deep" / "notes.txt").write_text("plain text")
    (tmp_path / "up" / "model.safetensors").write_bytes(noise(5000))
    (tmp_path / "up" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    found = ask(
        hub,
        tmp_path / "cache",
        f"""
        url = api.create_repo("org/model")
        again = api.create_repo("org/model", exist_ok=True)
        first = api.upload_folder(folder_path={str(tmp_path / "up")!r}, repo_id="org/model")
        second = api.upload_folder(folder_path={str(tmp_path / "up")!r}, repo_id="org/model")
        folder = snapshot_download("org/model")
        info = api.model_info("org/model", files_metadata=True)
        paths = {{entry.path: type(entry).__name__ for entry in api.list_repo_tree("org/model", recursive=True)}}
        lfs = api.get_paths_info("org/model", ["model.safetensors", "missing"])
        show([url, again, first.oid, second.oid, folder, info.sha, paths, [entry.lfs.sha256 for entry in lfs]])
        """,
        token=hub.token,
    )
    url, again, first, second, folder, sha, paths, lfs = found
    assert url == again == f"{hub.url}/org/model"
    assert first == second == sha == hub.repo("org/model").head.sha
    assert len(hub.requests("POST", "/commit/main")) == 1
    assert paths == {
        ".gitattributes": "RepoFile",
        "README.md": "RepoFile",
        "deep": "RepoFolder",
        "deep/notes.txt": "RepoFile",
        "model.safetensors": "RepoFile",
    }
    assert lfs == [hashlib.sha256(noise(5000)).hexdigest()]
    for uploaded in ("deep/notes.txt", "model.safetensors", "README.md"):
        assert (Path(folder) / uploaded).read_bytes() == (tmp_path / "up" / uploaded).read_bytes()
    cdn = [request for request, _ in hub.log if request.origin == "cdn"]
    assert [request.method for request in cdn] == ["PUT", "GET"], "large files, and only they, travel by the CDN"
    assert all(request.token is None for request in cdn), "the token must not leave the Hub's own origin"


def test_a_commit_on_a_stale_parent_is_refused_and_changes_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    old = hub.add("org/model", {"a.txt": b"one"}).head.sha
    hub.add("org/model", {"a.txt": b"two"})
    refused, accepted = ask(
        hub,
        tmp_path,
        f"""
        add = lambda text: [CommitOperationAdd("a.txt", text.encode())]
        delete = [CommitOperationDelete("a.txt"), CommitOperationAdd("b.txt", b"kept")]
        refused = failure(api.create_commit, "org/model", add("three"), commit_message="late", parent_commit="{old}")
        head = api.model_info("org/model").sha
        show([refused, api.create_commit("org/model", delete, commit_message="timely", parent_commit=head).oid])
        """,
        token=hub.token,
    )
    assert refused == ["HfHubHTTPError", 412]
    titles = [commit.title for commit in hub.repo("org/model").commits.values()]
    assert titles == ["initial commit", "Add files", "Add files", "timely"]
    assert hub.repo("org/model").head.sha == accepted
    assert set(hub.repo("org/model").head.files) == {".gitattributes", "b.txt"}


def test_a_file_is_found_by_branch_tag_and_commit_and_each_absence_has_its_own_error(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    sha = hub.add("org/model", {"a.txt": b"one"}).head.sha
    hub.add("org/model", {"a.txt": b"two"})
    hub.add("org/gated", {"a.txt": b"mine"}).gated_for = {"ada"}
    hub.add("org/hidden", {"a.txt": b"mine"}, private=True)
    program = f"""
        get = lambda repo, name="a.txt", **options: hf_hub_download(repo, name, **options)
        tagging = [failure(api.create_tag, "org/model", tag="v1", revision="{sha}") for _ in range(2)]
        texts = [open(get("org/model", revision=revision)).read() for revision in ("main", "v1", "{sha}") if {{signed}}]
        tags = {{{{tag.name: tag.target_commit for tag in api.list_repo_refs("org/model").tags}}}}
        if {{signed}}:
            api.delete_tag("org/model", tag="v1")
        show([
            tagging, texts, tags, failure(api.delete_tag, "org/model", tag="v1"),
            failure(get, "org/model", revision="v2"), failure(get, "org/model", "b.txt"), failure(get, "org/none"),
            failure(get, "org/gated"), failure(get, "org/hidden"), failure(api.create_repo, "org/new"),
        ])
        """
    absent = [["RevisionNotFoundError", 404], ["RemoteEntryNotFoundError", 404]]
    writer = ask(hub, tmp_path / "a", program.format(signed=True), token=hub.token)
    assert writer[:4] == [
        [None, ["HfHubHTTPError", 409]],
        ["two", "one", "one"],
        {"v1": sha},
        ["RevisionNotFoundError", 404],
    ]
    assert writer[4:] == [*absent, ["RepositoryNotFoundError", 404], None, None, None]

    reader = ask(hub, tmp_path / "b", program.format(signed=False), token=hub.read_token)
    denied = ["HfHubHTTPError", 403]
    assert reader[0] == [denied, denied]
    assert reader[3:] == [
        denied,
        *absent,
        ["RepositoryNotFoundError", 404],
        ["GatedRepoError", 403],
        ["RepositoryNotFoundError", 404],
        denied,
    ]

    nobody = ask(hub, tmp_path / "c", program.format(signed=False))
    unknown, unauthorized = ["RepositoryNotFoundError", 401], ["HfHubHTTPError", 401]
    assert nobody[0] == [unauthorized, unauthorized]
    assert nobody[3:] == [unauthorized, *absent, unknown, ["GatedRepoError", 401], unknown, unauthorized]


def test_a_broken_download_goes_on_where_it_stopped(hub: LoopbackHub, tmp_path: Path) -> None:
    data = noise(24 * MEBIBYTE)
    hub.add("org/model", {"model.safetensors": data})
    hub.fail("truncate", "GET /cdn/")
    path = ask(hub, tmp_path, 'show(hf_hub_download("org/model", "model.safetensors"))')
    assert Path(path).read_bytes() == data
    first, second = hub.requests("GET", "/cdn/")
    assert (first[1], second[1]) == (200, 206)
    assert second[0].headers["range"] == f"bytes={10 * MEBIBYTE}-", "the client writes whole pieces of 10 MiB"


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("drop", "GET /cdn/"),
        ("delay", "GET /cdn/"),
        ("truncate", "GET /cdn/"),
        ("delay", "HEAD /org/model/resolve/"),
        ("status", "HEAD /org/model/resolve/"),
    ],
)
def test_the_client_gets_over_one_passing_fault_of_a_download(
    hub: LoopbackHub, tmp_path: Path, kind: Any, where: str
) -> None:
    hub.add("org/model", {"model.safetensors": noise(4000)})
    hub.fail(kind, where, seconds=60.0)
    patience = {"HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    path = ask(hub, tmp_path, 'show(hf_hub_download("org/model", "model.safetensors"))', **patience)
    assert Path(path).read_bytes() == noise(4000)
    assert len(hub.requests(*where.split())) >= 2


def test_what_the_client_cannot_get_over(hub: LoopbackHub, tmp_path: Path) -> None:
    """Wrong bytes of the right length pass unseen; a failed commit changes nothing; a lost answer hides a commit."""
    data = noise(4000)
    hub.add("org/model", {"model.safetensors": data})
    before = hub.repo("org/model").head.sha
    hub.fail("corrupt", "GET /cdn/")
    hub.fail("drop", "POST .*/commit/main")
    hub.fail("status", "POST .*/commit/main")
    hub.fail("lose_answer", "POST .*/commit/main")
    hub.fail("corrupt", "PUT /cdn/")
    path, *failures, head, uploaded = ask(
        hub,
        tmp_path,
        """
        path = hf_hub_download("org/model", "model.safetensors")
        commit = lambda: api.create_commit("org/model", [CommitOperationAdd("a.txt", b"a")], commit_message="a")
        heads = [(failure(commit), api.model_info("org/model").sha) for _ in range(3)]
        damaged = [CommitOperationAdd("b.bin", b"b" * 100)]
        lost = failure(api.create_commit, "org/model", damaged, commit_message="b")
        show([path, *heads, commit().oid, lost])
        """,
        token=hub.token,
    )
    served = Path(path).read_bytes()
    assert len(served) == len(data)
    assert [i for i in range(len(data)) if served[i] != data[i]] == [len(data) // 2]
    after = hub.repo("org/model").head.sha
    assert failures == [
        [["RemoteProtocolError", None], before],
        [["HfHubHTTPError", 503], before],
        [["RemoteProtocolError", None], after],
    ]
    assert head == after, "the same commit again finds nothing to change"
    assert uploaded == ["RuntimeError", None]
    assert hashlib.sha256(b"b" * 100).hexdigest() not in hub.repo("org/model").lfs_objects


def test_the_hf_command_uploads_tags_and_downloads(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(noise(3000))
    hf = str(Path(sys.executable).with_name("hf"))
    for command in (
        ["auth", "whoami"],
        ["repos", "create", "org/model"],
        ["upload", "org/model", str(tmp_path / "weights.bin"), "weights.bin", "--commit-message", "by hand"],
        ["repos", "tag", "create", "org/model", "v1"],
        ["download", "org/model", "weights.bin", "--revision", "v1", "--local-dir", str(tmp_path / "down")],
    ):
        done = hub.run([hf, *command], tmp_path / "cache", token=hub.token)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert hub.token not in done.stdout + done.stderr
    assert hub.repo("org/model").head.title == "by hand"
    assert hub.repo("org/model").tags == {"v1": hub.repo("org/model").head.sha}
    assert (tmp_path / "down" / "weights.bin").read_bytes() == noise(3000)


def test_datasets_loads_a_parquet_dataset_and_timm_a_model_from_it(hub: LoopbackHub, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    labels = {"train": [1, 2, 3], "test": [7]}
    for split in labels:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"label": labels[split]}), buffer)
        card = b"---\nlicense: apache-2.0\n---\n"
        files = {f"data/{split}-00000-of-00001.parquet": buffer.getvalue(), "README.md": card}
        hub.add("org/dataset", files, "dataset")
    hub.repo("org/dataset", "dataset").tags["v1"] = hub.repo("org/dataset", "dataset").head.sha
    load = """
        import datasets
        splits = datasets.load_dataset("org/dataset", revision="v1")
        labels = {name: split["label"][:] for name, split in splits.items()}
        """
    more = """
        import timm, torch
        from timm.models import push_to_hf_hub
        one = datasets.load_dataset("org/dataset", data_files={"test": "data/test-*.parquet"}, split="test")
        model = timm.create_model("resnet10t", num_classes=5).eval()
        push_to_hf_hub(model, "org/model", model_config={"num_classes": 5}, safe_serialization=True)
        loaded = timm.create_model("hf-hub:org/model", pretrained=True).eval()
        images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
        show([labels, one["label"][:], torch.equal(model(images), loaded(images))])
        """
    assert ask(hub, tmp_path, load + more, token=hub.token) == [labels, [7], True]
    assert set(hub.repo("org/model").head.files) > {"config.json", "model.safetensors"}
    asked = len(hub.log)
    assert ask(hub, tmp_path, load.rstrip(" ") + "        show(labels)", HF_HUB_OFFLINE="1") == labels, "from the cache"
    assert len(hub.log) == asked
