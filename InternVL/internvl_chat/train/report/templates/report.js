// Draw the charts in the colors of the page, enlarge figures, and refresh the page during training.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const { charts, colors } = JSON.parse(document.getElementById("charts").textContent);

  function draw({ key, figure }) {
    const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
    let text = JSON.stringify(figure);
    if (dark.matches) for (const [light, color] of Object.entries(colors)) text = text.replaceAll(light, color);
    const { data, layout } = JSON.parse(text);
    layout.font = { family: "system-ui, sans-serif", size: 12, color: color("--muted") };
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    for (const axis of [layout.xaxis, layout.yaxis]) Object.assign(axis, { gridcolor: color("--line"), linecolor: color("--line") });
    layout.hoverlabel = { bgcolor: color("--panel"), bordercolor: color("--line"), font: { color: color("--text") } };
    layout.dragmode = touch ? false : "zoom"; // dragging scrolls the page on a touch screen
    const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    const element = document.getElementById(`chart-${key}`);
    // Milliseconds since the page was opened.
    return Plotly.react(element, data, layout, options).then(() => { element.dataset.drawn = Math.round(performance.now()); });
  }
  // One chart at a time, so that the page stays responsive and the first chart appears early.
  const drawAll = () => charts.reduce((drawn, chart) => drawn.then(() => new Promise(requestAnimationFrame)).then(() => draw(chart)), Promise.resolve());
  drawAll();
  dark.addEventListener("change", drawAll);

  for (const button of document.querySelectorAll("button.figure")) {
    button.addEventListener("click", () => button.setAttribute("aria-pressed", button.ariaPressed !== "true"));
  }

  const refresh = document.getElementById("refresh");
  if (refresh) {
    const key = `m3llm ${location.pathname}`;
    const details = [...document.querySelectorAll("details")];
    const state = JSON.parse(sessionStorage.getItem(key) ?? '{"open": [], "paused": false}');
    refresh.checked = !state.paused;
    details.forEach((element, i) => { element.open ||= state.open.includes(i); });
    const save = () => sessionStorage.setItem(key, JSON.stringify({
      paused: !refresh.checked, open: details.flatMap((element, i) => (element.open ? [i] : [])),
    }));
    refresh.addEventListener("change", save);
    setInterval(() => {
      if (!refresh.checked || document.hidden) return;
      save();
      location.reload();
    }, 1000 * refresh.dataset.seconds);
  }
})();
