"""A real server with an engine that does what it is told: keys, bounds, clients that leave, faults, an end."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from models.errors import UserError
from serving.command import parse, serve
from tests.support.scripted import BROKEN, FAULT, NUMBERLESS, SLOW
from tests.support.served import Served, served

SECONDS = 20


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def body(content: str, **more: Any) -> dict[str, Any]:
    return {"model": "bundled", "messages": [{"role": "user", "content": content}], **more}


def ask(server: Served, content: str, **more: Any) -> httpx.Response:
    return server.http.post("/v1/chat/completions", json=body(content, **more))


def running(server: Served) -> int:
    return int(server.http.get("/health").json()["running"])


def error_of(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_let_go(scripted_server: Served, stream: bool) -> None:
    server, sent = scripted_server, json.dumps(body(SLOW, max_tokens=400, stream=stream)).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(sent)}\r\n\r\n"
        connection.sendall(head.encode() + sent)
        eventually(lambda: running(server) == 1)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    left = time.monotonic()
    eventually(lambda: running(server) == 0)
    assert time.monotonic() - left < 2, "the whole answer takes 5 s"
    assert ask(server, "hello", max_tokens=4).status_code == 200


def test_a_client_that_closes_its_stream_is_let_go(scripted_server: Served) -> None:
    stream = scripted_server.client().chat.completions.create(**body(SLOW, max_tokens=400, stream=True))
    next(iter(stream))
    stream.close()
    eventually(lambda: running(scripted_server) == 0)


def test_answers_are_not_mixed(scripted_server: Served) -> None:
    def one(number: int) -> str:
        return str(ask(scripted_server, f"question {number}", max_tokens=20).json()["choices"][0]["message"]["content"])

    alone = [one(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == alone
    assert len(set(alone)) == 8


def test_eight_are_decoded_together_and_the_answers_of_one_request_too(scripted_server: Served) -> None:
    """One that leaves and one without numbers harm nobody."""
    alone = [ask(scripted_server, f"{SLOW} {number}", max_tokens=20).json()["choices"][0]["message"] for number in range(4)]
    faults = scripted_server.http.get("/health").json()["faults"]
    leaving = scripted_server.client().chat.completions.create(**body(f"{SLOW} away", max_tokens=200, stream=True))
    next(iter(leaving))
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(ask, scripted_server, f"{SLOW} {number}", max_tokens=20) for number in range(4)]
        numberless = pool.submit(ask, scripted_server, f"{SLOW} {NUMBERLESS}", max_tokens=20)
        eventually(lambda: running(scripted_server) == 6)
        leaving.close()
        assert [one.result().json()["choices"][0]["message"] for one in asked] == alone
        assert numberless.result().status_code == 500 and "no finite numbers" in error_of(numberless.result())["message"]
    began = time.monotonic()
    several = ask(scripted_server, f"{SLOW} 0", max_tokens=20, n=8).json()["choices"]
    assert [choice["message"] for choice in several] == [alone[0]] * 8
    assert time.monotonic() - began < 1.5, "one after another they take 2 s"
    assert scripted_server.http.get("/health").json()["faults"] == faults


def test_a_fault_is_an_error_and_no_end(scripted_server: Served) -> None:
    client = scripted_server.client()
    before = scripted_server.http.get("/health").json()["faults"]
    with pytest.raises(openai.InternalServerError, match="wait 17 of SM 3 expired") as caught:
        client.chat.completions.create(**body(FAULT, max_tokens=40))
    assert caught.value.code == "engine_fault"
    eventually(lambda: scripted_server.http.get("/health").status_code == 200)  # not while the engine is tried again
    with pytest.raises(openai.APIError, match="wait 17 of SM 3 expired"):
        pieces = [chunk.choices[0] for chunk in client.chat.completions.create(**body(FAULT, max_tokens=40, stream=True))]
        assert pieces, "what came before the fault is there"
    eventually(lambda: scripted_server.http.get("/health").status_code == 200)
    health = scripted_server.http.get("/health")
    assert health.status_code == 200 and health.json()["faults"] == before + 2
    assert "wait 17" in health.json()["last_fault"]
    assert ask(scripted_server, "hello", max_tokens=4).status_code == 200


def test_health_tells_while_the_engine_is_away(scripted_server: Served) -> None:
    assert error_of(ask(scripted_server, BROKEN))["code"] == "engine_fault"
    eventually(lambda: scripted_server.http.get("/health").json()["state"] == "failed")
    health, refused = scripted_server.http.get("/health"), ask(scripted_server, "hello")
    assert health.status_code == refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    eventually(lambda: scripted_server.http.get("/health").status_code == 200)
    assert ask(scripted_server, "hello", max_tokens=4).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("DELETE", "/v1/models", 405), ("GET", "/v1/chat/completions", 405), ("GET", "/docs", 404)],
)
def test_what_is_not_there_is_said_in_the_same_form(scripted_server: Served, method: str, path: str, status: int) -> None:
    response = scripted_server.http.request(method, path)
    assert response.status_code == status and error_of(response)["type"] == "invalid_request_error"


def test_the_description_of_the_api_is_whole(scripted_server: Served) -> None:
    told = scripted_server.http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/health"} <= told["paths"].keys()
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(told)))
    assert references and all(name.rpartition("/")[2] in told["components"]["schemas"] for name in references)


def test_a_body_of_another_kind_is_refused(scripted_server: Served) -> None:
    response = scripted_server.http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415 and error_of(response)


def test_every_answer_has_a_name(scripted_server: Served) -> None:
    names = {scripted_server.http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(names) == 3


def test_prompts_stay_out_of_the_log(scripted_server: Served) -> None:
    assert ask(scripted_server, "a secret word", max_tokens=4).status_code == 200
    assert ask(scripted_server, "another secret", colour="secret red").status_code == 400
    eventually(lambda: "POST /v1/chat/completions 400" in "".join(scripted_server.log))
    assert "secret" not in "".join(scripted_server.log)


def test_a_server_with_a_key_small_limits_and_a_talkative_log() -> None:
    limits = ("--queue", "2", "--queue-seconds", "0.4", "--answer-seconds", "1", "--body-bytes", "2000", "--name", "mine")
    with served(*limits, "--log-prompts", "--api-key", "sesame-123") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame-123"}):
            for path in ("/v1/models", "/metrics"):
                response = server.http.get(path, headers=headers)
                assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
        assert server.http.get("/health").status_code == 200 and server.http.get("/").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        client = server.client("sesame-123")
        assert [model.id for model in client.models.list()] == ["mine"]
        server.http.headers["Authorization"] = "Bearer sesame-123"
        crowd(server)
        long = server.http.post("/v1/chat/completions", json=body("a" * 3000))
        assert long.status_code == 413 and error_of(long)
        chunked = server.http.post(
            "/v1/completions", content=iter([b" " * 1500] * 2), headers={"Content-Type": "application/json"}
        )
        assert chunked.status_code == 413
        assert ask(server, "a spoken word", max_tokens=4, model="mine").status_code == 200
        eventually(lambda: "a spoken word" in "".join(server.log))
        assert "sesame" not in "".join(server.log)


def crowd(server: Served) -> None:
    """One that runs until its time is over, two that wait until theirs is, one that finds no room."""
    results: dict[int, httpx.Response] = {}

    def one(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60, headers=server.http.headers) as http:
            results[number] = http.post("/v1/chat/completions", json=body(SLOW, max_tokens=400, model="mine"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    threads[0].start()
    eventually(lambda: running(server) == 1)
    for thread in threads[1:]:
        thread.start()
    eventually(lambda: server.http.get("/health").json()["waiting"] == 2)
    full = server.http.post("/v1/chat/completions", json=body("late", model="mine"))
    assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1 and "are waiting" in error_of(full)["message"]
    for thread in threads:
        thread.join()
    assert results[0].status_code == 504 and error_of(results[0])["code"] == "timeout"
    for number in (1, 2):
        assert results[number].status_code == 503 and "waited for more than 0.4 s" in error_of(results[number])["message"]
        assert int(results[number].headers["retry-after"]) >= 1
    eventually(lambda: running(server) == 0)


def test_a_signal_lets_answers_end() -> None:
    with served("--answer-tokens", "7") as server:
        assert ask(server, "how long?").json()["usage"]["completion_tokens"] == 7
        stream = iter(server.client().chat.completions.create(**body(SLOW, max_tokens=40, stream=True)))
        pieces = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        pieces += stream
        assert pieces[-1].choices[0].finish_reason == "length"
        assert server.process.wait(timeout=20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)


def test_who_is_not_done_in_time_is_told() -> None:
    with served("--grace-seconds", "0.5") as server:
        stream = iter(server.client().chat.completions.create(**body(SLOW, max_tokens=400, stream=True)))
        next(stream)
        server.process.send_signal(signal.SIGINT)  # as Ctrl-C does
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        assert server.process.wait(timeout=20) == 0


def test_a_port_that_is_taken_and_a_key_that_is_none_are_refused_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = parse(["--model", "/nowhere", "--port", str(taken.getsockname()[1])])
        with pytest.raises(UserError, match="choose another --host or --port"):
            serve(options)
    for key in ("ä b", "", "a b"):
        with pytest.raises(UserError, match="key"):
            parse(["--api-key", key])
