"use strict";

// A cell's own number where it has one, so that "1,234" and "12.5%" sort as what they are.
function keyOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.key ?? cell.textContent.trim();
}

function compare(a, b, number) {
  return number ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true, sensitivity: "base" });
}

// Empty cells come last, whichever way the rest goes.
function sortBy(table, head) {
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending";
  const number = head.dataset.kind === "number";
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
  const known = rows.filter(([key]) => key !== "");
  known.sort(([a], [b]) => (down ? compare(b, a, number) : compare(a, b, number)));
  body.append(...known.map(([, row]) => row), ...rows.filter(([key]) => key === "").map(([, row]) => row));
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
}

function filter(form, rows) {
  const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = ["model", "dataset", "method"].map((name) => [name, form.elements[name].value]);
  let shown = 0;
  for (const { row, text } of rows) {
    const fits = words.every((word) => text.includes(word)) && chosen.every(([name, value]) => !value || row.dataset[name] === value);
    row.hidden = !fits;
    shown += fits;
  }
  form.querySelector("output").textContent = `${shown} of ${rows.length} cells`;
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => sortBy(table, head));
  }
}

const form = document.querySelector("form.filters");
if (form) {
  const body = document.querySelector("table.filtered").tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
  for (const event of ["input", "change"]) form.addEventListener(event, () => filter(form, rows));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter(form, rows);
}
