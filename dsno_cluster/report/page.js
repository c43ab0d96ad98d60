// The slider between two pictures of the same layout; without this they stand side by side.
document.documentElement.classList.add("js");
for (const compare of document.querySelectorAll(".compare")) {
  const range = compare.querySelector("input");
  const sides = compare.querySelector(".sides");
  const plate = compare.querySelector(".plate");
  const [left, rest] = [...compare.querySelectorAll(".control span")].map((name) => name.textContent);
  const show = () => {
    compare.style.setProperty("--at", `${range.value}%`);
    range.setAttribute("aria-valuetext", `${left} on the left ${range.value} percent, ${rest} on the rest`);
  };
  const follow = (event) => {
    const box = plate.getBoundingClientRect();
    range.value = Math.round(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * 100);
    show();
  };
  range.addEventListener("input", show);
  sides.addEventListener("pointerdown", (event) => {
    sides.setPointerCapture(event.pointerId); // so that the drag goes on outside the picture
    follow(event);
  });
  sides.addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
  show();
}
