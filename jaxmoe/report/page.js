"use strict";
// Figures come as JSON in the page; this file draws them and wires the controls.
(function () {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const narrow = window.matchMedia("(max-width: 40rem)").matches;
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: narrow ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };

  function plot(id) {
    const layout = data[id].layout;
    if (narrow) {
      layout.margin = Object.assign({}, layout.margin, { l: 44, r: 8 });
      layout.font = Object.assign({}, layout.font, { size: 11 });
      layout.legend = Object.assign({}, layout.legend, { font: { size: 11 } });
    }
    // On a touch screen a drag has to scroll the page, not to zoom the figure.
    if (touch) layout.dragmode = false;
    return Plotly.newPlot("plot-" + id, data[id].traces, layout, config);
  }

  function indices(id) {
    const found = {};
    data[id].traces.forEach(function (trace, i) {
      if (trace.meta) found[trace.meta] = i;
    });
    return found;
  }

  function restyle(id, marks) {
    const at = indices(id);
    return Promise.all(Object.keys(marks).map(function (name) {
      const update = {};
      Object.keys(marks[name]).forEach(function (key) { update[key] = [marks[name][key]]; });
      return Plotly.restyle("plot-" + id, update, [at[name]]);
    }));
  }

  function wireFans() {
    const slider = document.getElementById("fan");
    if (!slider) return;
    const label = document.getElementById("fan-label");
    const sentence = document.getElementById("fan-sentence");
    const fans = data.loss.fans;
    function show() {
      const fan = fans[Number(slider.value)];
      label.textContent = fan.label + (fan.law ? ", " + fan.law : "");
      sentence.textContent = fan.sentence;
      slider.setAttribute("aria-valuetext", label.textContent);
      restyle("loss", fan.marks);
    }
    function turn(by) {
      slider.value = Number(slider.value) + by;
      show();
    }
    slider.addEventListener("input", show);
    document.getElementById("fan-back").addEventListener("click", function () { turn(-1); });
    document.getElementById("fan-next").addEventListener("click", function () { turn(1); });
    // Browsers restore a slider's old place on reload; the figure always starts at the page's own.
    slider.value = data.loss.selected;
  }

  function wireViews() {
    const buttons = document.querySelectorAll("[data-view]");
    buttons.forEach(function (button) {
      button.addEventListener("click", function () {
        buttons.forEach(function (other) {
          other.setAttribute("aria-pressed", String(other === button));
        });
        Plotly.relayout("plot-loss", Object.assign({}, data.loss.views[button.dataset.view]));
      });
    });
  }

  function wireLayers() {
    const choice = document.getElementById("layer");
    if (!choice) return;
    choice.value = "0";
    choice.addEventListener("change", function () {
      const chosen = data.load.layers[Number(choice.value)];
      restyle("load", chosen.marks).then(function () {
        if (chosen.layout) Plotly.relayout("plot-load", Object.assign({}, chosen.layout));
      });
    });
  }

  function wireAcross() {
    const choice = document.getElementById("across");
    if (!choice) return;
    choice.selectedIndex = 0;
    choice.addEventListener("change", function () {
      const axis = data.loss.axes[choice.value];
      const places = axis.x.map(function (_, i) { return i; });
      Plotly.update("plot-loss", { x: axis.x },
        { "xaxis.title.text": axis.title, "xaxis.autorange": true }, places);
    });
  }

  Promise.all(Object.keys(data).map(plot)).then(function () {
    wireFans();
    wireViews();
    wireLayers();
    wireAcross();
    document.documentElement.dataset.drawn = "yes";
  });
})();
