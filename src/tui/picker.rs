//! A list to choose from by typing parts of names.

use super::text::Line;

/// One thing to choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What is chosen.
    pub name: String,
    /// What is said of it.
    pub note: String,
}

/// The list while it is open.
#[derive(Clone, Debug)]
pub struct Picker {
    /// The parameter it is for.
    pub field: usize,
    /// What is typed.
    pub line: Line,
    /// What may stand between several; `None`: one is chosen.
    pub several: Option<char>,
    /// Those that are marked.
    pub marked: Vec<String>,
    /// The row under the cursor, among those that match.
    pub cursor: usize,
    items: Vec<Item>,
}

impl Picker {
    /// Opens with what is chosen now.
    pub fn new(field: usize, items: Vec<Item>, several: Option<char>, now: &str) -> Self {
        let marked: Vec<String> = match several {
            Some(between) => {
                now.split(between).filter(|n| !n.is_empty()).map(str::to_owned).collect()
            }
            None => Vec::new(),
        };
        let first = marked.first().map_or(now, String::as_str);
        let cursor = items.iter().position(|i| i.name == first).unwrap_or_default();
        Self { field, line: Line::default(), several, marked, cursor, items }
    }

    /// What matches, the best first.
    pub fn matches(&self) -> Vec<&Item> {
        let typed = self.line.text().to_lowercase();
        if typed.trim().is_empty() {
            return self.items.iter().collect();
        }
        let mut found: Vec<(i32, &Item)> = self
            .items
            .iter()
            .filter_map(|item| Some((score(&typed, &item.name.to_lowercase())?, item)))
            .collect();
        found.sort_by_key(|(score, _)| -score);
        found.into_iter().map(|(_, item)| item).collect()
    }

    /// Moves the cursor.
    pub fn go(&mut self, by: isize) {
        let last = self.matches().len().saturating_sub(1);
        self.cursor = self.cursor.saturating_add_signed(by).min(last);
    }

    /// Marks the row under the cursor, or not.
    pub fn mark(&mut self) {
        let Some(name) = self.matches().get(self.cursor).map(|i| i.name.clone()) else { return };
        match self.marked.iter().position(|m| *m == name) {
            Some(at) => drop(self.marked.remove(at)),
            None => self.marked.push(name),
        }
    }

    /// The value: what is marked, with the row under the cursor where nothing is; what was typed where nothing matches
    /// it.
    pub fn chosen(&self) -> String {
        let typed = self.line.text();
        let matches = self.matches();
        let under = matches.get(self.cursor).map(|i| i.name.clone());
        match self.several {
            Some(between) if !self.marked.is_empty() && (typed.is_empty() || under.is_none()) => {
                self.marked.join(&between.to_string())
            }
            _ if looks_like_path(&typed) => typed,
            _ => under.unwrap_or(typed),
        }
    }
}

/// Whether a file is meant, or a preset with parameters.
fn looks_like_path(text: &str) -> bool {
    text.contains(['/', '\\', ':', '+', ',']) || text.contains(".gguf") || text.contains(".toml")
}

/// How well `typed` stands in `name`, as a subsequence; `None` where it does not. Parts that hang together, and beginnings of
/// words, count more; short names win among equals.
pub fn score(typed: &str, name: &str) -> Option<i32> {
    let mut letters = name.char_indices().peekable();
    let (mut total, mut last) = (0, None::<usize>);
    for wanted in typed.chars().filter(|c| !c.is_whitespace()) {
        let at = letters.by_ref().find(|(_, c)| *c == wanted)?.0;
        let before = name[..at].chars().next_back();
        total += 1;
        total += if last.is_some_and(|l| l + 1 == at) { 4 } else { 0 };
        total += if before.is_none_or(|c| !c.is_alphanumeric()) { 3 } else { 0 };
        last = Some(at);
    }
    if name.contains(typed) {
        total += 8;
    }
    Some(total * 64 - i32::try_from(name.len()).unwrap_or(i32::MAX).min(63))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picker(several: Option<char>, now: &str) -> Picker {
        let names = ["full", "h2o", "snapkv", "batch-max", "batch-max-one-shot", "kv-int8"];
        let item = |n: &str| Item { name: n.to_owned(), note: String::new() };
        Picker::new(0, names.map(item).to_vec(), several, now)
    }

    #[test]
    fn parts_of_names_find_them() {
        let mut p = picker(None, "snapkv");
        assert_eq!(p.chosen(), "snapkv");
        p.line.insert("bm");
        p.cursor = 0;
        assert_eq!(p.chosen(), "batch-max");
        p.line.insert("os");
        assert_eq!(p.chosen(), "batch-max-one-shot");
        p.line.insert("zzz");
        assert_eq!(p.matches().len(), 0);
        assert_eq!(p.chosen(), "bmoszzz");
        let mut p = picker(None, "full");
        p.line.insert("kv");
        assert_eq!(p.matches()[0].name, "kv-int8");
    }

    #[test]
    fn several_are_marked() {
        let mut p = picker(Some(' '), "full");
        p.go(1);
        p.mark();
        assert_eq!(p.chosen(), "full h2o");
        p.mark();
        p.go(-1);
        p.mark();
        assert!(p.marked.is_empty());
        p.line.insert("snapkv:budget=12%");
        assert_eq!(p.chosen(), "snapkv:budget=12%");
    }
}
