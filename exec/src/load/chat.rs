//! ChatML: the one chat format that is rendered here.
//!
//! Templates are programs in a language of their own. Only the plainest is recognised, by its text without white space;
//! any other model gets its prompts as they are typed.

/// A recognised template.
pub(super) struct ChatMl {
    /// What the template puts first when the conversation has no system message.
    system: Option<String>,
}

const TURN: &str =
    r"{{'<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>'+'\n'}}{%endfor%}";
const ANSWER: &str = r"{%ifadd_generation_prompt%}{{'<|im_start|>assistant\n'}}{%endif%}";
const LOOP: &str = "{%formessageinmessages%}";
const NO_SYSTEM: &str = "{%ifloop.firstandmessages[0]['role']!='system'%}{{'<|im_start|>system";
/// An older spelling has this in front.
const DEFAULT_FLAG: &str =
    "{%ifnotadd_generation_promptisdefined%}{%setadd_generation_prompt=false%}{%endif%}";

impl ChatMl {
    /// Recognises the template, or not.
    pub(super) fn recognise(template: &str) -> Option<Self> {
        let marks = template
            .replace("{%-", "{%")
            .replace("-%}", "%}")
            .replace("{{-", "{{")
            .replace("-}}", "}}");
        // A line break is written as itself or as an escape.
        let unescaped = marks.replace(r"\n", "\n");
        let squeeze = |text: &str| text.split_whitespace().collect::<String>();
        let body = squeeze(&unescaped);
        let body = body.strip_prefix(DEFAULT_FLAG).unwrap_or(&body);
        let body = body.strip_prefix(LOOP)?;
        let (turn, answer) = (TURN.replace(r"\n", ""), ANSWER.replace(r"\n", ""));
        let body = body.strip_suffix(&format!("{turn}{answer}"))?;
        if body.is_empty() {
            return Some(Self { system: None });
        }
        let inner = body.strip_prefix(NO_SYSTEM)?.strip_suffix("<|im_end|>'}}{%endif%}")?;
        let text = unescaped.split_once("<|im_start|>system\n")?.1.split_once("<|im_end|>")?.0;
        let plain = !text.contains(['\'', '{', '}', '\\']) && squeeze(text) == inner;
        plain.then(|| Self { system: Some(text.to_owned()) })
    }

    /// One turn of the user, and the beginning of the answer.
    pub(super) fn render(&self, user: &str) -> String {
        let system = match &self.system {
            Some(text) => format!("<|im_start|>system\n{text}<|im_end|>\n"),
            None => String::new(),
        };
        format!("{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMOL: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}\
        {% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn the_template_of_the_default_model_is_rendered_with_its_system_message() {
        let chat = ChatMl::recognise(SMOL).expect("ChatML");
        assert_eq!(
            chat.render("Hi"),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
             <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
        let escaped = SMOL.replace('\n', r"\n");
        assert_eq!(ChatMl::recognise(&escaped).expect("ChatML").render("Hi"), chat.render("Hi"));
    }

    #[test]
    fn a_template_without_system_message_starts_with_the_user() {
        let plain = format!("{LOOP}{TURN}{ANSWER}");
        let rendered = ChatMl::recognise(&plain).expect("ChatML").render("Hi");
        assert_eq!(rendered, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn other_templates_are_not_guessed_at() {
        for other in [
            "",
            "{{ bos_token }}",
            &SMOL.replace("loop.first", "tools"),
            &SMOL.replace("helpful", "{{x}}"),
        ] {
            assert!(ChatMl::recognise(other).is_none(), "{other}");
        }
    }
}
