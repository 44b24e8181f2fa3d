"""Python for the head of a program that reports, as a list of JSON, what it wrote, started,
connected to or unpickled.

``sys.addaudithook(audit)`` begins, ``report()`` prints.
"""

from __future__ import annotations

AUDIT = """
import json, os, sys
SEEN = []
MEANS_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os." + name for name in "mkdir rename remove rmdir link symlink truncate chmod chown utime mkfifo".split()}
STARTS = {"os." + name for name in "system exec posix_spawn spawn fork forkpty startfile".split()} | {"subprocess.Popen"}
OTHERS = {"socket", "urllib", "http", "ftplib", "smtplib", "imaplib", "poplib", "nntplib", "telnetlib", "webbrowser", "pickle", "ctypes"}

def audit(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(path, int):
            return
        if (isinstance(flags, int) and flags & MEANS_WRITING) or (isinstance(mode, str) and set(mode) & set("wax+")):
            SEEN.append((event, os.path.abspath(os.fsdecode(path))))
    elif event in CHANGES:  # (path, ..., descriptor of the folder it is relative to, or -1)
        folder = os.readlink(f"/proc/self/fd/{args[-1]}") if isinstance(args[-1], int) and args[-1] >= 0 else os.getcwd()
        paths = [path for path in args[:2] if isinstance(path, (str, bytes, os.PathLike))]
        SEEN.extend((event, os.path.normpath(os.path.join(folder, os.fsdecode(path)))) for path in paths)
    elif event in STARTS:
        SEEN.append((event, str(args[1] if event == "subprocess.Popen" else args[0])))
    elif event.partition(".")[0] in OTHERS:
        SEEN.append((event, repr(args)))

def report():
    print("\\n" + json.dumps(SEEN))
"""
