//! The monitor: one command at a time with a deadline, and events as they come.
//!
//! A thread reads the socket to its end, so QEMU never waits for us; it passes answers to whoever asked and events on. It
//! reads at most 1 MiB of a line: QEMU is as trusted as the guest that may have taken it over.
//!
//! # Source
//! QEMU Machine Protocol, `docs/interop/qmp-spec.txt` of QEMU 7.2.

use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::IoSlice;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use iaas_core::Error;
use iaas_core::Result;
use nix::sys::socket::ControlMessage;
use nix::sys::socket::MsgFlags;
use serde_json::Value;
use serde_json::json;

/// An event that changes what we know of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest or the host ended the machine; QEMU exits next.
    Shutdown {
        /// QEMU's word for why: `guest-shutdown`, `guest-reset`, `host-qmp-quit` …
        reason: String,
    },
    /// The vCPUs were stopped.
    Stop,
    /// The vCPUs run.
    Resume,
    /// A device has left; its id.
    DeviceDeleted(String),
    /// The guest crashed.
    GuestPanicked,
    /// The connection is at its end: QEMU is gone, or no longer makes sense.
    Closed,
}

/// The asking side of a monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    answers: mpsc::Receiver<Value>,
    next: u64,
}

impl Qmp {
    /// Takes the connection to a starting QEMU. `on_event` is called on the reader's thread.
    ///
    /// # Errors
    /// `Timeout`: QEMU did not greet in time. `Unavailable`: it closed the connection, or no thread can be made.
    pub fn connect(
        stream: UnixStream,
        limit: Duration,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<Self> {
        let (send, answers) = mpsc::channel();
        let reading = stream.try_clone().map_err(|e| broken(&e))?;
        std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || read_all(reading, &send, on_event))
            .map_err(|e| broken(&e))?;
        let mut qmp = Self { stream, answers, next: 0 };
        qmp.answer(limit, |message| message.get("QMP").is_some())?;
        qmp.execute("qmp_capabilities", &json!({}), limit)?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// `Timeout`: no answer within `limit`; the command may still take effect. `Unavailable`: QEMU is gone. `Conflict`:
    /// QEMU refused; its reason is in the detail.
    pub fn execute(&mut self, command: &str, arguments: &Value, limit: Duration) -> Result<Value> {
        self.run(command, arguments, None, limit)
    }

    /// Gives QEMU a descriptor under a name.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn give_fd(&mut self, name: &str, fd: &OwnedFd, limit: Duration) -> Result<()> {
        self.run("getfd", &json!({ "fdname": name }), Some(fd), limit).map(drop)
    }

    fn run(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: Option<&OwnedFd>,
        limit: Duration,
    ) -> Result<Value> {
        self.next += 1;
        let id = self.next;
        let message = json!({ "execute": command, "arguments": arguments, "id": id });
        self.send(format!("{message}\n").as_bytes(), fd, limit).map_err(|e| broken(&e))?;
        let mut answer =
            self.answer(limit, |message| message.get("id").and_then(Value::as_u64) == Some(id))?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(Error::conflict(format!("the VMM refused `{command}`"))
                .detail(answer.pointer("/error/desc").and_then(Value::as_str).unwrap_or("?"))),
        }
    }

    fn send(&mut self, message: &[u8], fd: Option<&OwnedFd>, limit: Duration) -> io::Result<()> {
        self.stream.set_write_timeout(Some(limit.max(Duration::from_millis(1))))?;
        let mut sent = 0;
        if let Some(fd) = fd {
            let fds = [fd.as_raw_fd()];
            sent = nix::sys::socket::sendmsg::<()>(
                self.stream.as_raw_fd(),
                &[IoSlice::new(message)],
                &[ControlMessage::ScmRights(&fds)],
                MsgFlags::MSG_NOSIGNAL,
                None,
            )?;
        }
        self.stream.write_all(message.get(sent..).unwrap_or_default())
    }

    /// Waits for the message that `is_it`; older ones, whose askers have given up, are dropped.
    fn answer(&self, limit: Duration, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.answers.recv_timeout(left) {
                Ok(message) if is_it(&message) => return Ok(message),
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(Error::timeout("the VMM did not answer in time"));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(Error::unavailable("the VMM has gone"));
                }
            }
        }
    }
}

fn read_all(stream: UnixStream, answers: &mpsc::Sender<Value>, mut on_event: impl FnMut(Event)) {
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let end = lines.by_ref().take(LINE_MAX).read_until(b'\n', &mut line);
        if !matches!(end, Ok(n) if n > 0) || line.last() != Some(&b'\n') {
            break;
        }
        let Ok(message) = serde_json::from_slice::<Value>(&line) else { break };
        match message.get("event").and_then(Value::as_str) {
            Some(name) => {
                if let Some(event) = event(name, message.get("data").unwrap_or(&Value::Null)) {
                    on_event(event);
                }
            }
            // Nobody waits any more when this end of the channel is closed; the events still matter.
            None => drop(answers.send(message)),
        }
    }
    on_event(Event::Closed);
}

fn event(name: &str, data: &Value) -> Option<Event> {
    let text = |field: &str| data.get(field).and_then(Value::as_str).map(str::to_owned);
    match name {
        "SHUTDOWN" => Some(Event::Shutdown { reason: text("reason").unwrap_or_default() }),
        "STOP" => Some(Event::Stop),
        "RESUME" => Some(Event::Resume),
        "DEVICE_DELETED" => text("device").map(Event::DeviceDeleted),
        "GUEST_PANICKED" => Some(Event::GuestPanicked),
        _ => None,
    }
}

fn broken(error: &io::Error) -> Error {
    Error::unavailable("the VMM's monitor does not work").because(error)
}

/// The longest line that is read; QEMU's longest answer to what we ask has a few hundred bytes.
const LINE_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    /// A QEMU that greets and then answers each line with the next of `script`.
    fn scripted(script: Vec<&'static str>) -> (Result<Qmp>, mpsc::Receiver<Event>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            theirs.write_all(b"{\"QMP\": {}}\n").unwrap();
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            for answer in script {
                let Some(Ok(_)) = lines.next() else { return };
                theirs.write_all(answer.as_bytes()).unwrap();
            }
            lines.next();
        });
        let (send, events) = mpsc::channel();
        (Qmp::connect(ours, LONG, move |event| drop(send.send(event))), events)
    }

    #[test]
    fn answers_find_their_question_and_events_pass() {
        let (qmp, events) = scripted(vec![
            "{\"return\": {}, \"id\": 1}\n",
            "{\"event\": \"STOP\"}\n{\"return\": 0, \"id\": 1}\n{\"return\": 7, \"id\": 2}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 3}\n",
        ]);
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.execute("a", &json!({}), LONG).unwrap(), 7);
        assert_eq!(events.recv().unwrap(), Event::Stop);
        let error = qmp.execute("b", &json!({}), LONG).unwrap_err();
        assert_eq!(error.operator(), ["no"]);
    }

    #[test]
    fn a_qemu_that_is_silent_or_gone_never_hangs_the_asker() {
        let (qmp, _events) = scripted(vec!["{\"return\": {}, \"id\": 1}\n", ""]);
        let mut qmp = qmp.unwrap();
        let error = qmp.execute("a", &json!({}), Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.kind(), iaas_core::ErrorKind::Timeout);
        let (qmp, events) = scripted(vec!["{\"return\": {}, \"id\": 1}\n", "not json\n"]);
        let error = qmp.unwrap().execute("a", &json!({}), LONG).unwrap_err();
        assert_eq!(error.kind(), iaas_core::ErrorKind::Unavailable);
        assert_eq!(events.recv().unwrap(), Event::Closed);
    }
}
