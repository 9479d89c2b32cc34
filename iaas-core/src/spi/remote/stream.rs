//! Streams over the wire: each read is a question whose answer is one item, so the reader's pace is the writer's.

use std::marker::PhantomData;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use super::Part;
use super::client::Link;
use super::client::stream_ask;
use super::client::told;
use super::frame::decode;
use super::frame::encode;
use super::gate::Inside;
use crate::Error;
use crate::ObjectRef;
use crate::Outcome;
use crate::Result;
use crate::spi::ByteStream;
use crate::spi::Feed;
use crate::spi::Pull;

/// The most bytes of one write on the wire.
const CHUNK: usize = 256 << 10;

/// What is done with a stream.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StreamArgs {
    pub(super) stream: u64,
    #[serde(default)]
    pub(super) bytes: Bytes,
}

/// The reader's end: at most one question is open, and its answer is kept if the reader goes away meanwhile.
struct End {
    link: Arc<Link>,
    part: Part,
    stream: u64,
    asked: Option<oneshot::Receiver<Result<Bytes>>>,
}

impl End {
    async fn pull<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let answer = match &mut self.asked {
            Some(answer) => answer,
            none => none.insert(ask(&self.link, self.part, "stream.read", self.stream, Bytes::new())?),
        };
        let body = told(answer).await;
        self.asked = None;
        decode(&body?)
    }

    async fn push(&mut self, verb: &str, bytes: Bytes) -> Result<()> {
        let mut answer = ask(&self.link, self.part, verb, self.stream, bytes)?;
        decode(&told(&mut answer).await?)
    }
}

fn ask(
    link: &Link,
    part: Part,
    verb: &str,
    stream: u64,
    bytes: Bytes,
) -> Result<oneshot::Receiver<Result<Bytes>>> {
    Ok(link.begin(stream_ask(part, verb, &StreamArgs { stream, bytes })?)?.detach())
}

impl Drop for End {
    fn drop(&mut self) {
        if let Ok(mut gone) =
            stream_ask(self.part, "stream.drop", &StreamArgs { stream: self.stream, bytes: Bytes::new() })
        {
            gone.id = 0;
            self.link.post(&super::frame::Up::Ask(Box::new(gone)));
        }
    }
}

/// A sequence of the other side.
pub(super) struct RemoteFeed<T> {
    end: End,
    items: PhantomData<fn() -> T>,
}

impl<T> RemoteFeed<T> {
    pub(super) fn new(link: Arc<Link>, part: Part, stream: u64) -> Self {
        Self { end: End { link, part, stream, asked: None }, items: PhantomData }
    }
}

#[async_trait]
impl<T: DeserializeOwned + Send> Pull<T> for RemoteFeed<T> {
    async fn next(&mut self) -> Option<Result<T>> {
        self.end.pull().await.transpose()
    }
}

/// A byte stream of the other side.
pub(super) struct RemoteBytes {
    end: End,
}

impl RemoteBytes {
    pub(super) fn new(link: Arc<Link>, part: Part, stream: u64) -> Self {
        Self { end: End { link, part, stream, asked: None } }
    }
}

#[async_trait]
impl ByteStream for RemoteBytes {
    async fn read(&mut self) -> Result<Option<Bytes>> {
        self.end.pull().await
    }

    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        for start in (0..bytes.len()).step_by(CHUNK) {
            let part = bytes.slice(start..bytes.len().min(start + CHUNK));
            self.end.push("stream.write", part).await?;
        }
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        self.end.push("stream.close", Bytes::new()).await
    }
}

/// A stream that stands on the side of the providers.
pub(super) enum Served {
    Feed(Feed<ObjectRef>),
    Bytes(Box<dyn ByteStream>),
}

/// What the other side wants of a stream, and how to answer.
pub(super) struct Wish {
    pub(super) verb: String,
    pub(super) bytes: Bytes,
    pub(super) answer: oneshot::Sender<Result<Bytes>>,
    /// Held until the wish is fulfilled, so that a claim waits for it.
    pub(super) inside: Option<Inside>,
}

/// Serves one stream until its reader drops it or its session ends.
pub(super) async fn serve(mut stream: Served, mut wishes: mpsc::Receiver<Wish>) {
    let mut reading: Option<Wish> = None;
    loop {
        tokio::select! {
            wish = wishes.recv() => {
                let Some(wish) = wish else { return };
                match wish.verb.as_str() {
                    "stream.read" => reading = Some(wish),
                    "stream.drop" => return,
                    _ => fulfil(&mut stream, wish).await,
                }
            }
            // Cancel-safe by contract: a write that comes meanwhile loses no item.
            item = stream.next(), if reading.is_some() => {
                if let Some(wish) = reading.take() {
                    let _ = wish.answer.send(item);
                    drop(wish.inside);
                }
            }
        }
    }
}

async fn fulfil(stream: &mut Served, wish: Wish) {
    let ended = match (stream, wish.verb.as_str()) {
        (Served::Bytes(stream), "stream.write") => stream.write(wish.bytes).await,
        (Served::Bytes(stream), "stream.close") => stream.close().await,
        (_, verb) => Err(Error::unsupported(format!("this stream has no `{verb}`"))),
    };
    let _ = wish.answer.send(ended.and_then(|()| encode(&()).map(Bytes::from)));
    drop(wish.inside);
}

impl Served {
    /// The next item, encoded as an option.
    async fn next(&mut self) -> Result<Bytes> {
        let item = match self {
            Self::Feed(feed) => encode(&feed.next().await.transpose()?)?,
            Self::Bytes(stream) => encode(&stream.read().await?)?,
        };
        Ok(item.into())
    }
}

/// The answer when a stream is not there (any more).
pub(super) fn gone() -> Error {
    Error::not_found("there is no such stream in this session").outcome_is(Outcome::NotDone)
}
