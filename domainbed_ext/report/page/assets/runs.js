// The list of runs: filters, ten rows at a time, and a run's details on a click.
{
  const PAGE = 10;
  const { common, runs: details } = JSON.parse(document.getElementById("details").textContent);
  const list = document.getElementById("list");
  const body = list.tBodies[0];
  const rows = [...body.rows];
  const filter = document.getElementById("filter");
  const pages = document.getElementById("pages");
  const [previous, next] = pages.querySelectorAll("button");
  const choices = [...document.querySelectorAll("#choose-runs select")];
  const columns = { method: 0, environment: 1, state: 2 };
  let [wanted, first] = [null, 0];

  const fits = (row) => (wanted ? wanted.has(row) : choices.every(({ value, dataset }) => !value || row.cells[columns[dataset.by]].textContent === value));
  const detailOf = (row) => (row.nextElementSibling?.classList.contains("detail") ? row.nextElementSibling : null);
  const fitting = () => [...body.rows].filter((row) => !row.classList.contains("detail") && fits(row));
  const refresh = () => {
    const all = fitting();
    first = Math.max(0, Math.min(first, Math.floor((all.length - 1) / PAGE) * PAGE));
    const shown = new Set(all.slice(first, first + PAGE));
    for (const row of rows) {
      row.hidden = !shown.has(row);
      if (detailOf(row)) detailOf(row).hidden = row.hidden;
    }
    filter.hidden = wanted === null;
    for (const choice of choices) choice.closest("p").hidden = wanted !== null;
    pages.hidden = all.length <= PAGE;
    pages.querySelector("span").textContent = `${Math.min(first + 1, all.length)} to ${Math.min(first + PAGE, all.length)} of ${all.length} runs`;
    [previous.disabled, next.disabled] = [first === 0, first + PAGE >= all.length];
  };
  const show = (rowsWanted) => { [wanted, first] = [rowsWanted, 0]; refresh(); };

  const pairs = (heading, entries) => {
    const facts = html("dl");
    for (const [name, value] of entries) facts.append(html("dt", {}, name), html("dd", {}, value));
    return html("div", { className: "facts" }, html("h3", {}, heading), facts);
  };
  const copyable = (what, command) => {
    const copy = html("button", { type: "button", className: "copy" }, "Copy");
    copy.setAttribute("aria-label", `Copy the command: ${what}`);
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command);
        announce("Copied.");
        copy.textContent = "Copied";
      } catch {  // not allowed here: the command is selected, for the keyboard to copy
        getSelection().selectAllChildren(copy.parentElement.querySelector("code"));
      }
    });
    return html("p", {}, html("b", {}, what), html("code", {}, command), copy);
  };
  const evaluations = ({ steps, loss, train, inside, outside, chosen }) => {
    const heads = ["step", "loss", "train", "in-domain", "out-of-domain"];
    const cells = (values) => values.map((value) => html("td", { className: "figure" }, value === null ? "–" : String(value)));
    const table = html("table", {},
      html("thead", {}, html("tr", {}, ...heads.map((head) => html("th", { scope: "col", className: "figure" }, head)))),
      html("tbody", {}, ...steps.map((step, place) => html("tr", { className: chosen.includes(step) ? "chosen" : "" },
        ...cells([step, loss[place]]), ...cells([train, inside, outside].map((values) => values[place]?.toFixed(1) ?? null))))));
    return html("details", { className: "evaluations" },
      html("summary", {}, `${steps.length} evaluation${steps.length === 1 ? "" : "s"}`), html("div", { className: "scroll" }, table));
  };
  const describe = (row) => {
    const run = details[row.id];
    const colour = row.querySelector("i").style.background;
    const charts = [
      chart("Loss", run.steps, [{ name: "loss", kind: "loss", values: run.loss }], run.chosen),
      chart("Accuracy (%)", run.steps, [
        { name: "train", kind: "train", values: run.train },
        { name: "in-domain", kind: "inside", values: run.inside },
        { name: "out-of-domain", kind: "outside", colour, values: run.outside },
      ], run.chosen),
    ].filter(Boolean);
    const parts = [pairs("Run", run.facts)];
    if (run.environments.length) parts.push(pairs("Accuracy by environment (%)", run.environments));
    if (run.made_of.length) {
      parts.push(pairs("Derived from", run.made_of.map(([weight, name, anchor]) => [`${weight} ×`, anchor ? html("a", { href: `#${anchor}` }, name) : name])));
    }
    for (const heading of new Set([...Object.keys(common), ...Object.keys(run.groups)])) {
      const facts = { ...common[heading], ...run.groups[heading] };
      parts.push(pairs(heading, Object.entries(facts).sort(([one], [other]) => one.localeCompare(other))));
    }
    const commands = html("div", { className: "commands" }, ...Object.entries(run.commands).map(([what, command]) => copyable(what, command)));
    return html("div", { className: "run" }, ...charts, ...parts, commands, evaluations(run));
  };
  const toggle = (row, open = !detailOf(row)) => {
    detailOf(row)?.remove();
    row.querySelector(".expand").setAttribute("aria-expanded", String(open));
    if (open) row.after(html("tr", { className: "detail" }, html("td", { colSpan: row.cells.length }, describe(row))));
  };

  for (const row of rows) {
    const head = row.cells[0];
    const button = html("button", { type: "button", className: "expand" });
    button.append(...head.childNodes);
    button.setAttribute("aria-expanded", "false");
    head.append(button);
    row.addEventListener("click", (event) => {
      if (!getSelection().toString() && !event.target.closest("a")) toggle(row);
    });
  }
  sortable(list, () => {
    for (const row of rows) row.querySelector(".expand").setAttribute("aria-expanded", "false");
    first = 0;
    refresh();
  });
  for (const choice of choices) {
    choice.addEventListener("change", () => {
      first = 0;
      refresh();
      announce(`${fitting().length} runs are listed.`);
    });
  }
  for (const [button, step] of [[previous, -PAGE], [next, PAGE]]) {
    button.addEventListener("click", () => { first += step; refresh(); });
  }

  // From a number to the runs behind it: those alone are listed, and one alone is open.
  const open = (row) => {
    if (row.hidden) {
      if (wanted && !wanted.has(row)) wanted = null;
      if (!fits(row)) for (const choice of choices) choice.value = "";
      first = fitting().indexOf(row);
      first -= first % PAGE;
      refresh();
    }
    toggle(row, true);
    row.scrollIntoView();
  };
  for (const link of document.querySelectorAll("a[data-runs]")) {
    link.addEventListener("click", (event) => {
      const behind = link.dataset.runs.split(" ").map((number) => rows[number]);
      const cell = link.closest("td");
      const column = cell.closest("table").tHead.rows[0].cells[cell.cellIndex].textContent.trim();
      const head = cell.parentElement.cells[0];
      const name = (head.querySelector(".label") || head).textContent.trim();
      show(new Set(behind));
      const count = behind.length === 1 ? "The run" : `The ${behind.length} runs`;
      filter.firstElementChild.textContent = `${count} behind ${link.textContent.trim().replace(/\s+/g, " ")} (${name}, ${column}).`;
      event.preventDefault();
      history.pushState(null, "", `#${behind[0].id}`);
      if (behind.length === 1) toggle(behind[0], true);
      document.getElementById("runs").scrollIntoView();
      behind[0].querySelector(".expand").focus({ preventScroll: true });
    });
  }
  filter.querySelector("button").addEventListener("click", () => show(null));
  const follow = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && rows.includes(target)) open(target);
    for (let fold = target?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    if (target && !rows.includes(target)) target.scrollIntoView();
  };
  window.addEventListener("hashchange", follow);
  window.addEventListener("popstate", () => { if (wanted) show(null); });
  refresh();
  if (location.hash) follow();
}
