//! A line of text that is being typed.

/// Characters that a line holds at most: a pasted novel is cut.
pub const LONGEST: usize = 200;

/// Text and cursor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    chars: Vec<char>,
    cursor: usize,
}

impl Line {
    /// With a text, the cursor behind it.
    pub fn new(text: &str) -> Self {
        let mut line = Self::default();
        line.insert(text);
        line
    }

    /// The text.
    pub fn text(&self) -> String {
        self.chars.iter().collect()
    }

    /// Puts text at the cursor: its first line, without what steers terminals. `false` where something was cut.
    pub fn insert(&mut self, text: &str) -> bool {
        let mut whole = true;
        for c in text.trim_end_matches(['\n', '\r']).chars() {
            if c == '\n' || c == '\r' || self.chars.len() >= LONGEST {
                whole = false;
                break;
            }
            if c.is_control() {
                continue;
            }
            self.chars.insert(self.cursor, c);
            self.cursor += 1;
        }
        whole
    }

    /// Removes the character before the cursor.
    pub fn backspace(&mut self) {
        if self.cursor > 0 {
            self.cursor -= 1;
            self.chars.remove(self.cursor);
        }
    }

    /// Removes the character at the cursor.
    pub fn delete(&mut self) {
        if self.cursor < self.chars.len() {
            self.chars.remove(self.cursor);
        }
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Moves the cursor by characters.
    pub fn go(&mut self, by: isize) {
        self.cursor = self.cursor.saturating_add_signed(by).min(self.chars.len());
    }

    /// The part around the cursor that `width` cells hold, and the cursor in it.
    pub fn window(&self, width: usize) -> (String, usize) {
        let from = (self.cursor + 1).saturating_sub(width.max(1));
        let text = self.chars.iter().skip(from).take(width).collect();
        (text, self.cursor - from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_novel_is_cut() {
        let mut line = Line::default();
        assert!(!line.insert(&"word ".repeat(100_000)));
        assert_eq!(line.text().chars().count(), LONGEST);
        let mut line = Line::new("ab");
        assert!(!line.insert("first\nsecond\x1b[2J"));
        assert_eq!(line.text(), "abfirst");
        let mut line = Line::default();
        assert!(line.insert("\x1b[2Jx\n"));
        assert_eq!(line.text(), "[2Jx");
    }

    #[test]
    fn the_window_follows_the_cursor() {
        let mut line = Line::new("0123456789");
        assert_eq!(line.window(4), ("789".into(), 3));
        line.go(-8);
        assert_eq!(line.window(4), ("0123".into(), 2));
        line.backspace();
        line.delete();
        assert_eq!(line.text(), "03456789");
    }
}
