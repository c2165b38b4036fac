"use strict";
(() => {
  const announce = (text) => { document.getElementById("announcement").textContent = text; };

  // Sorting. A cell's key is its leading number, or its text; what is missing goes last either way.
  const numberOf = (text) => parseFloat(text.replace(/,/g, "").replace("−", "-").replace(/^[+]/, ""));
  for (const table of document.querySelectorAll("article table")) {
    const body = table.tBodies[0];
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      header.querySelector("button").addEventListener("click", () => {
        const figures = header.classList.contains("figure");
        const before = header.getAttribute("aria-sort");
        const first = figures ? "descending" : "ascending";
        const second = figures ? "ascending" : "descending";
        const order = before === first ? second : first;
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...body.rows].map((row) => {
          const text = row.cells[column].textContent.trim();
          return { row, key: figures ? numberOf(text) : text };
        });
        rows.sort((a, b) => {
          if (!figures) return sign * a.key.localeCompare(b.key, "en", { numeric: true });
          if (Number.isNaN(a.key) || Number.isNaN(b.key)) return Number.isNaN(a.key) - Number.isNaN(b.key);
          return sign * (a.key - b.key);
        });
        let above = "";
        for (const { row } of rows) {
          row.classList.toggle("again", row.cells[0].textContent === above);
          row.classList.remove("break");  // groups are of the first order
          above = row.cells[0].textContent;
          body.append(row);
        }
        for (const other of headers) other.setAttribute("aria-sort", other === header ? order : "none");
        announce(`Sorted by ${header.textContent.trim()}, ${order}.`);
      });
    });
  }

  // Two rows of the tables, and their difference. Each pair is there in both directions: of these one is shown, unless a
  // row is chosen.
  for (const controls of document.querySelectorAll(".pairs")) {
    const article = controls.closest("article");
    const selects = [...controls.querySelectorAll("select")];
    const rows = [...article.querySelectorAll("tbody tr")];
    const refresh = () => {
      const anyRow = selects.every(({ dataset, value }) => dataset.by === "metric" || !value);
      for (const row of rows) {
        const fits = selects.every(({ dataset, value }) => !value || row.dataset[dataset.by] === value);
        row.hidden = !fits || (anyRow && row.classList.contains("reversed"));
      }
    };
    for (const select of selects) {
      select.addEventListener("change", () => {
        refresh();
        const shown = rows.filter((row) => !row.hidden);
        announce(`${shown.length} ${shown.length === 1 ? "difference is" : "differences are"} shown.`);
      });
    }
    controls.hidden = false;
    refresh();
  }

  // From a number to the runs behind it: those alone are shown, the first of them open.
  const filter = document.getElementById("filter");
  const runs = [...document.querySelectorAll(".group > details")];
  const choices = [...document.querySelectorAll("#choose select")];
  const chosen = (element) => choices.every((choice) => !choice.value || element.dataset[choice.dataset.by] === choice.value);
  let wanted = null;
  const refresh = () => {
    for (const run of runs) run.hidden = wanted !== null ? !wanted.has(run.id) : !chosen(run);
    for (const group of document.querySelectorAll(".group")) {
      group.hidden = [...group.querySelectorAll(":scope > details")].every((run) => run.hidden);
    }
    filter.hidden = wanted === null;
  };
  const show = (ids) => { wanted = ids; refresh(); };

  // Rows and runs of one adaptation or one objective.
  const choose = () => {
    for (const row of document.querySelectorAll("tr[data-adaptation]")) row.hidden = !chosen(row);
    show(null);
  };
  for (const choice of choices) {
    choice.closest("p").hidden = false;
    choice.addEventListener("change", () => {
      choose();
      announce(`Shown: ${choices.map(({ dataset, value }) => `${dataset.by} ${value || "all"}`).join(", ")}.`);
    });
  }
  const open = (id) => {
    const run = id && document.getElementById(id);
    if (!run || !runs.includes(run)) return;
    if (run.hidden) {
      for (const choice of choices) choice.value = "";
      choose();
    }
    run.open = true;
    run.scrollIntoView();
  };
  for (const link of document.querySelectorAll("a[data-runs]")) {
    link.addEventListener("click", (event) => {
      const ids = link.dataset.runs.split(" ");
      const cell = link.closest("td");
      const table = cell.closest("table");
      const column = table.tHead.rows[0].cells[cell.cellIndex].textContent.trim();
      const row = cell.parentElement.cells[0].textContent.trim();
      show(new Set(ids));
      const count = ids.length === 1 ? "The run" : `The ${ids.length} runs`;
      filter.firstElementChild.textContent = `${count} behind ${link.textContent.trim()} (${row}, ${column}).`;
      event.preventDefault();
      history.pushState(null, "", `#${ids[0]}`);
      document.getElementById(ids[0]).open = ids.length === 1;
      document.getElementById("runs").scrollIntoView();
      document.querySelector(`#${CSS.escape(ids[0])} > summary`).focus({ preventScroll: true });
    });
  }
  filter.querySelector("button").addEventListener("click", () => show(null));
  window.addEventListener("hashchange", () => open(decodeURIComponent(location.hash.slice(1))));
  open(decodeURIComponent(location.hash.slice(1)));
})();
