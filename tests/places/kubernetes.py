"""A stand-in for Kubernetes on loopback: an API server that keeps what it is sent, and a kubelet that runs pods as processes.

A pod's process is the entry point of the image, with the pod's arguments and environment. For what volumes, the image and the
cluster's DNS would do, names are replaced: paths by those of this machine, services by its address.
"""

import asyncio
import json
import re
import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.environments import without_path
from tests.faults.commands import end_session
from tests.stores.process import HOST

ROOT = Path(__file__).parents[2]
Manifest = dict[str, Any]


class Kubernetes:
    """What was asked of it, in order, is in ``made``: the manifests of pods, services, config maps."""

    def __init__(self, folder: Path, image: Mapping[str, object]) -> None:
        """Pods write below `folder`; `image` says where paths of the image are here."""
        self.made: list[Manifest] = []
        self.url = ""
        self._folder = folder
        self._image = {path: str(place) for path, place in image.items()}
        self._kept: dict[tuple[str, str, str], Manifest] = {}  # namespace, plural, name
        self._watchers: list[tuple[web.Request, web.WebSocketResponse]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pods: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()

    def of(self, kind: str) -> list[Manifest]:
        """Manifests of one kind, as they were made."""
        return [manifest for manifest in self.made if manifest["kind"] == kind]

    def phase(self, pod: Manifest) -> str:
        """How far a pod of ``made`` has come."""
        (kept,) = (kept for key, kept in self._kept.items() if key[1:] == ("pods", pod["metadata"]["name"]))
        return str(kept["status"]["phase"])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve; on leaving, every process of a pod ends."""
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            self.url = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(30)
            yield
        finally:
            for process in self._processes:
                end_session(process.pid)
                process.wait()
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    async def _serve(self) -> str:
        app = web.Application()
        path = "/api/v1/namespaces/{namespace}/{plural}"
        app.router.add_get(path, self._list)
        app.router.add_delete(path, self._delete)
        app.router.add_post(path, self._make)
        app.router.add_get(path + "/{name}", self._get)
        app.router.add_patch(path + "/{name}", self._make)
        app.router.add_delete(path + "/{name}", self._delete)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, 0).start()
        return f"http://{HOST}:{self._runner.addresses[0][1]}"

    async def _list(self, request: web.Request) -> web.StreamResponse:
        namespace, plural = request.match_info["namespace"], request.match_info["plural"]
        if request.query.get("watch") == "true":
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            self._watchers.append((request, socket))
            async for _ in socket:
                pass
            return socket
        kept = (kept for (*place, _), kept in self._kept.items() if place == [namespace, plural])
        items = [manifest for manifest in kept if _selects(request, manifest)]
        return web.json_response(
            {"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items}
        )

    async def _get(self, request: web.Request) -> web.Response:
        kept = self._kept.get(_key(request))
        return web.json_response(kept) if kept else _no_such(request)

    async def _make(self, request: web.Request) -> web.Response:
        manifest = json.loads(await request.text())
        key = (request.match_info["namespace"], request.match_info["plural"], manifest["metadata"]["name"])
        if key in self._kept:  # a patch: of labels, or of owners by server-side apply
            self._kept[key]["metadata"] |= manifest["metadata"]
            return web.json_response(self._kept[key])
        self.made.append(json.loads(json.dumps(manifest)))
        manifest["metadata"] |= {"uid": str(uuid.uuid4()), "resourceVersion": "1", "namespace": key[0]}
        self._kept[key] = manifest
        if manifest["kind"] == "Pod":
            manifest["status"] = {"phase": "Pending", "podIP": HOST}
            self._pods.add(self._loop.create_task(self._run(key)))
        return web.json_response(manifest, status=201)

    async def _delete(self, request: web.Request) -> web.Response:
        *place, name = _key(request)
        for key in [key for key in self._kept if [*key[:2]] == place and name in ("", key[2])]:
            if _selects(request, self._kept[key]):
                await self._tell("DELETED", key, self._kept.pop(key))
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    async def _tell(self, event: str, key: tuple[str, str, str], manifest: Manifest) -> None:
        for request, socket in self._watchers:
            if _key(request)[:2] == key[:2] and _selects(request, manifest):
                with suppress(ConnectionError):
                    await socket.send_json({"type": event, "object": manifest})

    # --- the kubelet ---

    async def _run(self, key: tuple[str, str, str]) -> None:
        """A pod, from its start, once its config maps are there, to its end."""
        pod = self._kept[key]
        container = pod["spec"]["containers"][0]
        maps = {volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume}
        while not all((key[0], "configmaps", name) in self._kept for name in maps):
            await asyncio.sleep(0.02)
        places = self._places(pod, container)
        work = self._folder / key[2]
        work.mkdir(parents=True)
        own = {"status.podIP": HOST, "metadata.name": key[2]}
        environment = {
            variable["name"]: _replaced(variable["value"], places)
            if variable.get("value") is not None
            else own[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            for variable in container["env"]
        }
        image = {"SPARK_HOME": self._image["/opt/spark"], "SPARK_LOCAL_IP": HOST}
        with (work / "log").open("wb") as log:
            process = subprocess.Popen(
                [str(ROOT / "conf/k8s/entrypoint.sh"), *(_replaced(word, places) for word in container["args"])],
                cwd=work,
                env=without_path() | image | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        await self._say(key, "Running", {"running": {}})
        code = await asyncio.to_thread(process.wait)
        await self._say(key, "Failed" if code else "Succeeded", {"terminated": {"exitCode": code}})

    async def _say(self, key: tuple[str, str, str], phase: str, state: Manifest) -> None:
        pod = self._kept.get(key)
        if pod:
            name = pod["spec"]["containers"][0]["name"]
            pod["status"] |= {"phase": phase, "containerStatuses": [{"name": name, "state": state}]}
            await self._tell("MODIFIED", key, pod)

    def _places(self, pod: Manifest, container: Manifest) -> dict[str, str]:
        """What to put for the paths and addresses that a pod is told; the files of its config maps are written there."""
        services = (key for key in self._kept if key[1] == "services")
        places = {f"{name}.{namespace}.svc": HOST for namespace, _, name in services}
        for mount in container["volumeMounts"]:
            folder = self._folder / "volumes" / pod["metadata"]["name"] / mount["name"]
            folder.mkdir(parents=True)
            places[mount["mountPath"]] = str(folder)
        for volume in pod["spec"]["volumes"]:
            folder = self._folder / "volumes" / pod["metadata"]["name"] / volume["name"]
            source = volume.get("configMap")
            if source:
                data = self._kept[pod["metadata"]["namespace"], "configmaps", source["name"]]["data"]
                for item in source["items"]:
                    own = places | self._image if item["path"] == "spark.properties" else {}
                    (folder / item["path"]).write_text(_replaced(data[item["key"]], own))
        return places | self._image


def _replaced(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


def _key(request: web.Request) -> tuple[str, str, str]:
    return request.match_info["namespace"], request.match_info["plural"], request.match_info.get("name", "")


def _selects(request: web.Request, manifest: Manifest) -> bool:
    """Whether it has the labels and the name that are asked for, which Spark says so: a=b,c!=d."""
    metadata = manifest["metadata"]
    has = {"metadata.name": metadata["name"]} | metadata.get("labels", {})
    asked = f"{request.query.get('labelSelector', '')},{request.query.get('fieldSelector', '')}"
    return all(_holds(pair, has) for pair in asked.split(",") if pair)


def _holds(asked: str, has: Mapping[str, str]) -> bool:
    key, equals, value = re.split("(!?=)", asked, maxsplit=1)
    return (has.get(key) == value) == (equals == "=")


def _no_such(request: web.Request) -> web.Response:
    status = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": "NotFound",
        "code": 404,
        "message": request.path,
    }
    return web.json_response(status, status=404)
