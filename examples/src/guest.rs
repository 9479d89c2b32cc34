//! A guest as its console shows it: evidence that does not come from our own state.

use std::sync::Arc;
use std::time::Duration;

use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::cloud::Session;
use iaas_core::model::Instance;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Follows the console of one instance, over restarts of whatever lies between.
#[derive(Debug)]
pub struct Guest {
    /// The instance.
    pub id: Id<Instance>,
    session: Session,
    text: watch::Receiver<String>,
    follower: JoinHandle<()>,
}

impl Guest {
    /// Begins to follow the console from its first byte.
    pub fn follow(session: &Session, id: Id<Instance>) -> Self {
        let (send, text) = watch::channel(String::new());
        let follower = tokio::spawn(follow(session.clone(), id, send));
        Self { id, session: session.clone(), text, follower }
    }

    /// The first line that begins with `prefix`, once it is there.
    ///
    /// # Errors
    /// `Timeout` after `within`, with the last lines of the console for the operator.
    pub async fn line(&mut self, prefix: &str, within: Duration) -> Result<String> {
        self.line_after(0, prefix, within).await.map(|(_, line)| line)
    }

    /// The first line at or after line number `from` that begins with `prefix`, and its number.
    ///
    /// # Errors
    /// As [`line`](Self::line).
    pub async fn line_after(
        &mut self,
        from: usize,
        prefix: &str,
        within: Duration,
    ) -> Result<(usize, String)> {
        let find = |text: &str| {
            let numbered = complete_lines(text).enumerate().skip(from);
            numbered.map(|(n, line)| (n, line.to_owned())).find(|(_, line)| line.starts_with(prefix))
        };
        let waiting = self.text.wait_for(|text| find(text).is_some());
        let found = tokio::time::timeout(within, waiting).await;
        if let Some(line) = found.ok().and_then(std::result::Result::ok).and_then(|text| find(&text)) {
            return Ok(line);
        }
        let tail: Vec<_> = self.lines().into_iter().rev().take(12).collect();
        let late =
            Error::timeout(format!("the guest did not print `{prefix}` within {} s", within.as_secs()));
        Err(tail.into_iter().rev().fold(late, Error::detail))
    }

    /// Every whole line so far.
    pub fn lines(&self) -> Vec<String> {
        complete_lines(&self.text.borrow()).map(str::to_owned).collect()
    }

    /// Makes the guest print a mark, and says the number of the line after it: everything there is newer than this call.
    ///
    /// # Errors
    /// Those of the console; `Timeout` after half a minute.
    pub async fn now(&mut self) -> Result<usize> {
        let mark = format!("MARK-{}", uuid::Uuid::now_v7().simple());
        self.type_line(&format!("sh echo {mark}")).await?;
        let (at, _) = self.line_after(0, &mark, PATIENCE).await?;
        Ok(at + 1)
    }

    /// Types a line and waits for an answer, printed after that, that begins with `answer`.
    ///
    /// # Errors
    /// As [`now`](Self::now).
    pub async fn ask(&mut self, line: &str, answer: &str) -> Result<String> {
        let from = self.now().await?;
        self.type_line(line).await?;
        self.line_after(from, answer, PATIENCE).await.map(|(_, line)| line)
    }

    async fn type_line(&self, line: &str) -> Result<()> {
        let mut input = self.session.instances().console_input(self.id).await?;
        input.write(format!("{line}\n")).await
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

/// The value of `key=` in a line of the guest.
pub fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

/// The number after `key=` in a line of the guest.
pub fn number(line: &str, key: &str) -> Option<f64> {
    value(line, key)?.parse().ok()
}

/// Lines that are whole: the last piece may still be growing.
fn complete_lines(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(str::trim)
}

async fn follow(session: Session, id: Id<Instance>, send: watch::Sender<String>) {
    let mut offset = 0;
    let session = Arc::new(session);
    while !send.is_closed() {
        if let Ok(mut console) = session.instances().console(id, offset).await {
            while let Ok(Some(bytes)) = console.read().await {
                offset += bytes.len() as u64;
                send.send_modify(|text| text.push_str(&String::from_utf8_lossy(&bytes)));
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// How long a guest may take to answer; where everything is emulated twice it takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);
