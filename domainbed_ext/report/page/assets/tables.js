"use strict";
const announce = (text) => { document.getElementById("announcement").textContent = text; };

// Sorting. A cell's key is its leading number, or the middle of an interval that stands alone, or its text; what is
// missing goes last either way. A third click restores the first order.
const numberOf = (text) => {
  const [low, high] = text.replace(/,/g, "").replace(/−/g, "-").split(" to ").map((each) => parseFloat(each.replace(/^[+<>]/, "")));
  return high === undefined || text.includes("(") ? low : (low + high) / 2;
};
const sortable = (table, changed = () => {}) => {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells].filter((header) => header.querySelector("button"));
  const size = Number(table.dataset.group || 1);
  const original = [...body.rows];
  const groups = original.flatMap((row, place) => (place % size ? [] : [original.slice(place, place + size)]));
  const classes = new Map(original.map((row) => [row, row.className]));
  const merges = original.some((row) => row.classList.contains("again"));
  const restore = () => {
    for (const row of original) { row.className = classes.get(row); body.append(row); }
  };
  for (const header of headers) {
    header.querySelector("button").addEventListener("click", () => {
      const column = header.cellIndex;
      const figures = header.classList.contains("figure");
      const orders = figures ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      const order = orders[orders.indexOf(header.getAttribute("aria-sort")) + 1] || orders[0];
      for (const detail of body.querySelectorAll(".detail")) detail.remove();
      if (order === "none") restore();
      else {
        const sign = order === "ascending" ? 1 : -1;
        const keyed = groups.map((rows) => {
          const text = rows[0].cells[column].textContent.trim();
          return { rows, key: figures ? numberOf(text) : text };
        });
        keyed.sort((a, b) => {
          if (!figures) return sign * a.key.localeCompare(b.key, "en", { numeric: true });
          if (Number.isNaN(a.key) || Number.isNaN(b.key)) return Number.isNaN(a.key) - Number.isNaN(b.key);
          return sign * (a.key - b.key);
        });
        let above = "";
        for (const row of keyed.flatMap(({ rows }) => rows)) {
          row.classList.toggle("again", merges && row.cells[0].textContent === above);
          row.classList.remove("break");  // groups are of the first order
          above = row.cells[0].textContent;
          body.append(row);
        }
      }
      for (const other of headers) other.setAttribute("aria-sort", other === header ? order : "none");
      changed();
      announce(order === "none" ? "In the first order." : `Sorted by ${header.textContent.trim()}, ${order}.`);
    });
  }
};
for (const table of document.querySelectorAll("article table")) sortable(table);

// On a narrow screen, the average is the first figure of a row.
const narrow = matchMedia("(max-width: 46rem)");
const places = [...document.querySelectorAll("th.average")].map((header) => ({ table: header.closest("table"), place: header.cellIndex }));
const arrange = () => {
  for (const { table, place } of places) {
    const first = [...table.tHead.rows[0].cells].findIndex((cell) => cell.classList.contains("figure"));
    for (const row of table.rows) {
      const now = [...table.tHead.rows[0].cells].findIndex((cell) => cell.classList.contains("average"));
      if (row.parentElement === table.tHead) continue;
      const cell = row.cells[now];
      if (narrow.matches && now !== first) row.insertBefore(cell, row.cells[first]);
      if (!narrow.matches && now !== place) row.insertBefore(cell, row.cells[place + 1] || null);
    }
    const heads = table.tHead.rows[0];
    const head = heads.querySelector(".average");
    if (narrow.matches && head.cellIndex !== first) heads.insertBefore(head, heads.cells[first]);
    if (!narrow.matches && head.cellIndex !== place) heads.insertBefore(head, heads.cells[place + 1] || null);
  }
};
narrow.addEventListener("change", arrange);
arrange();

// Rows of one adaptation or one objective.
{
  const choices = [...document.querySelectorAll("#choose select")];
  const refresh = () => {
    for (const row of document.querySelectorAll("tr[data-adaptation]")) {
      row.hidden = !choices.every(({ value, dataset }) => !value || row.dataset[dataset.by] === value);
    }
  };
  for (const choice of choices) {
    choice.closest("p").hidden = false;
    choice.addEventListener("change", () => {
      refresh();
      announce(`Shown: ${choices.map(({ dataset, value }) => `${dataset.by} ${value || "all"}`).join(", ")}.`);
    });
  }
}
