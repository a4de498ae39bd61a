"""What a node tells its operator."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Final, cast

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos import node_pb2
from server_side import metrics as metrics_module
from server_side.metrics import Metrics, MetricsServer
from server_side.table import SessionState
from wire.errors import BusyError, ConfigError, LimitExceededError

HOST: Final = "127.0.0.1"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def server(metrics: Metrics) -> Iterator[MetricsServer]:
    with contextlib.closing(metrics.serve(HOST, 0)) as running:
        yield running


def get(port: int, path: str, host: str = HOST) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()


def values(text: str) -> dict[str, float]:
    """Every sample of a scrape, by name and labels, without those that say when a series began."""
    return {
        sample.name + "".join(f" {label}={value}" for label, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_scrape_tells_what_happened(metrics: Metrics, server: MetricsServer) -> None:
    metrics.sessions_found_lost(3)
    for _ in range(3):
        metrics.session_opened()
    metrics.session_ended(SessionState.CLOSED)
    metrics.session_ended(SessionState.EXPIRED)
    metrics.received(1000)
    metrics.received(24)
    metrics.sent(77)
    metrics.frame_answered(node_pb2.PHASE_FORWARD, 0.02)
    metrics.frame_answered(node_pb2.PHASE_BACKWARD, 0.2)
    metrics.frame_answered(node_pb2.PHASE_BACKWARD, 2.0)
    metrics.frame_resent()
    metrics.step_applied()
    metrics.refused(BusyError("no room"))

    status, text = get(server.port, "/metrics")

    told = values(text)
    assert status == 200
    expected = {
        "cloister_node_sessions_open": 1,
        "cloister_node_draining": 0,
        "cloister_node_steps_total": 1,
        "cloister_node_received_bytes_total": 1024,
        "cloister_node_sent_bytes_total": 77,
        "cloister_node_resent_frames_total": 1,
        "cloister_node_frames_total phase=forward": 1,
        "cloister_node_frames_total phase=backward": 2,
        "cloister_node_frames_total phase=loss": 0,
        "cloister_node_frames_total phase=update": 0,
        "cloister_node_frames_total phase=unspecified": 0,
        "cloister_node_compute_seconds_count phase=backward": 2,
        "cloister_node_compute_seconds_sum phase=backward": pytest.approx(2.2),
        "cloister_node_compute_seconds_bucket le=0.3 phase=backward": 1,
        "cloister_node_compute_seconds_count phase=forward": 1,
        "cloister_node_refusals_total reason=BUSY": 1,
        "cloister_node_sessions_ended_total how=closed": 1,
        "cloister_node_sessions_ended_total how=expired": 1,
        "cloister_node_sessions_ended_total how=lost": 3,
    }
    assert {name: told.get(name) for name in expected} == expected
    assert {name.split(" ")[0] for name in told} == {name.split(" ")[0] for name in expected}


def test_T02_what_peers_send_never_makes_a_new_series(metrics: Metrics) -> None:
    before = len(values(prometheus_client.generate_latest(metrics.registry).decode()))

    for foreign in range(5, 500):
        metrics.frame_answered(cast("node_pb2.Phase.ValueType", foreign), 0.1)
        metrics.refused(LimitExceededError(f"owner {foreign:x} sent something of its own making"))

    after = values(prometheus_client.generate_latest(metrics.registry).decode())
    assert len(after) == before + 1
    assert after["cloister_node_frames_total phase=unspecified"] == 495
    assert after["cloister_node_refusals_total reason=LIMIT_EXCEEDED"] == 495


def test_two_nodes_in_one_process_count_apart_and_leave_the_global_registry_alone() -> None:
    one, two = Metrics(), Metrics()

    one.session_opened()

    assert one.registry.get_sample_value("cloister_node_sessions_open") == 1
    assert two.registry.get_sample_value("cloister_node_sessions_open") == 0
    assert prometheus_client.REGISTRY.get_sample_value("cloister_node_sessions_open") is None


def test_health_is_ok_until_the_node_drains(metrics: Metrics, server: MetricsServer) -> None:
    before = get(server.port, "/healthz")
    metrics.drain()
    after = get(server.port, "/healthz")

    assert before == (200, "ok")
    assert after == (503, "draining")
    assert "cloister_node_draining 1.0" in get(server.port, "/metrics")[1]


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metricsx", "/../etc/passwd"])
def test_any_other_path_is_not_found(server: MetricsServer, path: str) -> None:
    assert get(server.port, path) == (404, "see /metrics and /healthz")


def test_closing_frees_the_port(metrics: Metrics) -> None:
    first = metrics.serve(HOST, 0)
    first.close()

    with contextlib.closing(metrics.serve(HOST, first.port)) as second:
        assert second.port == first.port
        assert get(second.port, "/healthz") == (200, "ok")


def test_ipv6_works(metrics: Metrics) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")

    with contextlib.closing(metrics.serve("::1", 0)) as server:
        assert get(server.port, "/healthz", host="[::1]") == (200, "ok")


def test_a_port_that_is_taken_is_named(metrics: Metrics, server: MetricsServer) -> None:
    with pytest.raises(ConfigError, match=rf"^metrics on {HOST}:{server.port}: .*in use; name a free port"):
        metrics.serve(HOST, server.port)


@pytest.mark.parametrize("port", [65536, -1])
def test_a_port_that_cannot_be_is_named(metrics: Metrics, port: int) -> None:
    with pytest.raises(ConfigError) as refused:
        metrics.serve(HOST, port)

    assert str(refused.value) == f"metrics on {HOST}:{port}: no such port; name one from 0 to 65535"


@pytest.mark.parametrize("host", ["256.256.256.256", "a" * 300, "\udc80"])
def test_a_host_that_is_not_here_is_named(metrics: Metrics, host: str) -> None:
    with pytest.raises(ConfigError, match="; name a free port of this machine"):
        metrics.serve(host, 0)


def test_T05_silent_scrapers_do_not_stop_the_others_and_are_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, metrics: Metrics
) -> None:
    assert metrics_module._Handler.timeout == metrics_module.SCRAPE_TIMEOUT_S  # too long for a test
    monkeypatch.setattr(metrics_module._Handler, "timeout", 0.5)
    with contextlib.closing(metrics.serve(HOST, 0)) as server, contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((HOST, server.port), timeout=10))
            for _ in range(metrics_module.MAX_SCRAPES - 1)
        ]
        started_at = time.monotonic()

        assert get(server.port, "/healthz") == (200, "ok")
        assert [each.recv(1) for each in silent] == [b""] * len(silent)
        assert time.monotonic() - started_at < 5


def test_T05_a_flood_of_scrapers_is_refused_and_passes(monkeypatch: pytest.MonkeyPatch, metrics: Metrics) -> None:
    monkeypatch.setattr(metrics_module._Handler, "timeout", 2.0)
    with contextlib.closing(metrics.serve(HOST, 0)) as server, contextlib.ExitStack() as stack:
        flood = [
            stack.enter_context(socket.create_connection((HOST, server.port), timeout=10))
            for _ in range(metrics_module.MAX_SCRAPES)
        ]

        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError, urllib.error.URLError)):
            get(server.port, "/healthz")

        for each in flood:
            assert each.recv(1) == b""
        for _ in range(50):  # a place is free as soon as the last thread has cleaned up behind itself
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError, urllib.error.URLError):
                assert get(server.port, "/healthz") == (200, "ok")
                break
            time.sleep(0.05)
        else:
            pytest.fail("the endpoint never came back")
