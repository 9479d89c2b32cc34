//! [`Artifacts`] over the wire.

use async_trait::async_trait;

use super::client::RemotePart;
use super::frame::Ask;
use super::frame::decode;
use super::server::Answer;
use super::server::converge;
use super::server::need;
use super::stream;
use crate::Id;
use crate::Result;
use crate::spi::ByteStream;
use crate::spi::Ctx;
use crate::spi::artifact::Artifact;
use crate::spi::artifact::Artifacts;

#[async_trait]
impl Artifacts for RemotePart {
    async fn upload(&self, cx: &Ctx, id: Id<Artifact>) -> Result<Box<dyn ByteStream>> {
        self.open_stream("upload", cx, &id).await
    }
}

pub(super) async fn answer(artifacts: &dyn Artifacts, ask: &Ask, cx: Option<&Ctx>) -> Result<Answer> {
    match ask.verb.as_str() {
        "upload" => {
            let upload = artifacts.upload(need(cx)?, decode(&ask.args)?).await?;
            Ok(Answer::Stream(stream::Served::Bytes(upload)))
        }
        _ => converge::<Artifact>(artifacts, ask, cx).await,
    }
}
