"""What a browser says of a page."""

import json
from typing import Any

from selenium.webdriver import Chrome


def requests(chrome: Chrome) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent]


def drawn(chrome: Chrome) -> dict[str, Any]:
    """id -> [traces, width, height, drawn marks] of each figure."""
    return chrome.execute_script("""
        const found = {};
        document.querySelectorAll(".plot").forEach(function (div) {
          const box = div.querySelector("svg.main-svg").getBoundingClientRect();
          const marks = div.querySelectorAll(
            ".scatterlayer .trace path, .heatmaplayer image, .barlayer .point path");
          const inked = Array.from(marks).filter(function (mark) {
            const size = mark.getBoundingClientRect();
            return size.width + size.height > 0;
          });
          found[div.id.slice(5)] = [div.data.length, box.width, box.height, inked.length];
        });
        return found;""")
