"""The server of the package `milvus` on loopback, with ports of its own, which can be killed and started again on the same folder."""
import os
import shutil
import socket


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def bound(port):
    "A socket on a port, or None; also on one that a killed server has left behind."
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(("127.0.0.1", port))
        s.listen()
        return s
    except OSError:
        s.close()


ETCD = """listen-client-urls: http://127.0.0.1:{client}
advertise-client-urls: http://127.0.0.1:{client}
listen-peer-urls: http://127.0.0.1:{peer}
initial-advertise-peer-urls: http://127.0.0.1:{peer}
initial-cluster: default=http://127.0.0.1:{peer}
"""


class MilvusProcess:
    "A Milvus server in a folder."

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        from milvus import MilvusServer, MilvusServerConfig
        before, etcd = os.environ.get("ETCD_CONFIG_PATH"), free_port()
        (self.folder / "etcd.yaml").write_text(ETCD.format(client=etcd, peer=free_port()))  # else every server wants 2379 and 2380
        os.environ["ETCD_CONFIG_PATH"] = str(self.folder / "etcd.yaml")
        try:
            config = MilvusServerConfig(data_dir=str(self.folder), proxy_port=self.port, etcd_port=etcd)
            config.try_bind_port = bound
            self.server = MilvusServer(config, wait_for_started=False)
            self.server.start()
        finally:
            os.environ.pop("ETCD_CONFIG_PATH") if before is None else os.environ.update(ETCD_CONFIG_PATH=before)
        self.process = self.server.server_proc
        self.server.wait_started(timeout=180_000)

    def kill(self):
        "SIGKILL, and wait until the process is gone."
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self.process = self.server.server_proc = None

    def remove(self):
        "Kill it and delete its folder."
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
