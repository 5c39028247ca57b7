// Draws the page's figures in the colours of the scheme that is shown, and answers its buttons.
"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const hidden = new Set();
  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 700px)");
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

  // The colour that a CSS variable has now; light-dark() is only resolved in a real property.
  function resolver() {
    const probe = document.createElement("span");
    document.body.append(probe);
    const known = new Map();
    const resolve = (value) => {
      if (!known.has(value)) {
        probe.style.color = value;
        known.set(value, getComputedStyle(probe).color);
      }
      return known.get(value);
    };
    return { resolve, done: () => probe.remove() };
  }

  function painted(value, resolve) {
    if (typeof value === "string") return /^var\(--[a-z0-9-]+\)$/.test(value) ? resolve(value) : value;
    if (Array.isArray(value)) return value.map((item) => painted(item, resolve));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, resolve)]));
  }

  function draw(id) {
    const { resolve, done } = resolver();
    const figure = painted((narrow.matches && figures[id].narrow) || figures[id], resolve);
    done();
    for (const trace of figure.data) trace.visible = !hidden.has(trace.meta?.mixer);
    for (const note of figure.layout.annotations ?? []) note.visible = !hidden.has(note.name);
    const plot = document.getElementById(id);
    return Plotly.react(plot, figure.data, figure.layout, config);
  }

  const drawAll = () => Promise.all(Object.keys(figures).map(draw));

  function showRow(plot, key) {
    const row = plot.closest(".card").querySelector(`tr[id$="-${CSS.escape(key)}"]`);
    if (!row) return;
    document.querySelectorAll("tr.lit").forEach((other) => other.classList.remove("lit"));
    row.classList.add("lit");
    row.scrollIntoView({ block: "center" });
  }

  function currentScheme() {
    return root.dataset.scheme ?? (systemDark.matches ? "dark" : "light");
  }

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.scheme = currentScheme() === "dark" ? "light" : "dark";
    drawAll();
  });
  systemDark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);

  document.getElementById("hardware")?.addEventListener("change", (event) => {
    const wanted = event.target.value;
    for (const section of document.querySelectorAll("[data-hardware]")) {
      section.hidden = wanted !== "" && section.dataset.hardware !== wanted;
      if (!section.hidden) section.querySelectorAll(".plot").forEach((plot) => Plotly.Plots.resize(plot));
    }
  });

  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const key = chip.dataset.mixer;
      if (!hidden.delete(key)) hidden.add(key);
      for (const twin of document.querySelectorAll(".chip")) {
        twin.setAttribute("aria-pressed", String(!hidden.has(twin.dataset.mixer)));
      }
      drawAll();
    });
  }

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }
  for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));

  function sortBy(heading) {
    const table = heading.closest("table");
    const column = heading.dataset.sort;
    const descending = heading.getAttribute("aria-sort") !== "descending";
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => {
      const cell = column === "mechanism" ? row.cells[0] : row.querySelector(`[data-column="${column}"]`);
      return cell?.dataset.value ?? cell?.textContent ?? "";
    };
    const order = (a, b) => {
      const [one, other] = [value(a), value(b)];
      if (one === "" || other === "") return one === other ? 0 : one === "" ? 1 : -1;
      const difference = isNaN(one) || isNaN(other) ? one.localeCompare(other) : one - other;
      return descending ? -difference : difference;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }
  for (const heading of document.querySelectorAll("th[data-sort]")) {
    heading.querySelector("button").addEventListener("click", () => sortBy(heading));
  }

  drawAll().then(() => {
    for (const plot of document.querySelectorAll(".plot")) {
      plot.on("plotly_click", (event) => {
        const key = event.points[0].data.meta?.row;
        if (key) showRow(plot, key);
      });
    }
    root.dataset.drawn = "yes";
  });
})();
