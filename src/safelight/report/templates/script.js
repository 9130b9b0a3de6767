const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const button = document.querySelector(".switch");
let chosen = null;

function paint() {
  const theme = chosen ?? (dark.matches ? "dark" : "light");
  root.dataset.theme = theme;
  button.textContent = theme === "dark" ? "Light" : "Dark";
}
button.addEventListener("click", () => {
  chosen = root.dataset.theme === "dark" ? "light" : "dark";
  paint();
});
dark.addEventListener("change", paint);
paint();

for (const veil of document.querySelectorAll(".veil")) {
  veil.addEventListener("click", () => {
    const open = veil.classList.toggle("open");
    veil.setAttribute("aria-label", open ? "Hide this picture" : "Show this picture");
  });
}
for (const more of document.querySelectorAll(".more")) {
  more.addEventListener("click", () => more.parentElement.classList.add("all"));
}
for (const copy of document.querySelectorAll(".shell button")) {
  copy.addEventListener("click", async () => {
    const text = copy.parentElement.querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(copy.parentElement.querySelector("pre"));
      copy.textContent = "Selected";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
}
