"""The search service's client, against a server on loopback: what is asked, what is kept, what is tried again."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from kd_accel.download.urls import read_urls
from kd_accel.filter import knn
from kd_accel.filter.verb import run
from kd_accel.filter_config import FilterConfig
from kd_accel.schema import ConfigError, validate


class Service(BaseHTTPRequestHandler):
    """Answers from `script`, a list per prompt: numbers are HTTP errors, what follows the last one is the answer."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        answers = self.server.script[asked["text"]]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps(None if isinstance(answer, int) else answer).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def service(monkeypatch):
    """A running server; waiting between tries is only counted."""
    server = HTTPServer(("127.0.0.1", 0), Service)
    server.asked, server.script, server.waited = [], {}, []
    monkeypatch.setattr(knn.time, "sleep", server.waited.append)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def question(service, tmp_path):
    def make(prompts, **values):
        url = f"http://127.0.0.1:{service.server_port}/knn-service"
        asked = {"url": url, "index_name": "small", "num_images": 4, **values}
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(prompts), encoding="utf-8")
        return validate(FilterConfig, {"prompts": str(file), "out": str(tmp_path), "service": asked})

    return make


def hit(name, similarity=0.3):
    return {"url": f"http://x/{name}.jpg", "caption": name, "id": 1, "similarity": similarity}


def rows(config):
    header, *lines = Path(config.out, "urls.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    assert header == "url\tcaption\tsimilarity\tprompt"
    return [line.split("\t") for line in lines]


def test_urls_of_all_prompts_are_written_once(service, question, capsys):
    """With caption, similarity and the first prompt that found them; results without a url are left out."""
    odd = hit("chat") | {"caption": 'chat\t"été"\n noir'}
    service.script = {
        "cat": [[hit("tom"), odd]],
        "dog": [[hit("tom", 0.1), {"caption": "no url"}, hit("rex") | {"caption": None}]],
    }
    config = question(["cat", "dog"])
    run(config)
    assert rows(config) == [
        ["http://x/tom.jpg", "tom", "0.3", "cat"],
        ["http://x/chat.jpg", 'chat "été" noir', "0.3", "cat"],
        ["http://x/rex.jpg", "", "0.3", "dog"],
    ]
    assert "3 urls for 2 of 2 prompts" in capsys.readouterr().out
    asked = service.asked[0]
    assert (asked["text"], asked["indice_name"], asked["modality"]) == ("cat", "small", "image")
    assert (asked["num_images"], asked["num_result_ids"]) == (4, 3000)
    assert (asked["deduplicate"], asked["use_safety_model"]) == (True, True)


def test_the_list_is_one_that_download_reads(service, question):
    service.script = {"cat": [[hit("tom"), hit("felix")]]}
    config = question(["cat"])
    run(config)
    found = read_urls(Path(config.out, "urls.tsv"), url="url", caption="caption")
    assert list(found) == [("http://x/tom.jpg", "tom"), ("http://x/felix.jpg", "felix")]


def test_what_may_pass_is_tried_again(service, question):
    """5xx and 429, after 1, 2, 4 seconds; other refusals are final. A prompt without an answer is counted."""
    service.script = {"cat": [500, 429, 503, [hit("tom")]], "dog": [404]}
    config = question(["cat", "dog"])
    run(config)
    assert [row[-1] for row in rows(config)] == ["cat"]
    assert service.waited == [1, 2, 4]
    assert [asked["text"] for asked in service.asked] == ["cat"] * 4 + ["dog"]


@pytest.mark.parametrize("answer", [404, {"error": "no such index"}])
def test_no_answer_at_all_is_an_error(service, question, answer):
    service.script = {"cat": [answer]}
    with pytest.raises(
        ConfigError, match=r"service.url=http://127.0.0.1:\d+/knn-service: no prompt got an answer; .*'cat'"
    ):
        run(question(["cat"]))


def test_a_service_that_is_not_there_is_an_error(service, question):
    config = question(["cat"], retries=1, url="http://127.0.0.1:9/knn-service")
    with pytest.raises(ConfigError, match="no prompt got an answer; the first: 'cat': ConnectError"):
        run(config)
    assert service.waited == [1]
