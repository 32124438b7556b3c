(() => {
  "use strict";
  // Theme: that of the system until one is chosen.
  const themes = ["auto", "light", "dark"], button = document.getElementById("theme");
  let theme = "auto";
  try { theme = localStorage.getItem("study-report-theme") || theme; } catch { /* not allowed for files */ }
  const show = () => {
    if (theme === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
  };
  button.onclick = () => {
    theme = themes[(themes.indexOf(theme) + 1) % 3];
    try { localStorage.setItem("study-report-theme", theme); } catch { /* the same */ }
    show();
  };
  show();
})();
