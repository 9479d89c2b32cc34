//! [`VolumePool`] and [`VolumeAccess`] over the wire.

use async_trait::async_trait;

use super::Part;
use super::client::RemotePart;
use super::frame::Ask;
use super::frame::decode;
use super::server::Answer;
use super::server::converge;
use super::server::need;
use super::server::no_verb;
use crate::Id;
use crate::Result;
use crate::Term;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::block::Fenced;
use crate::spi::block::PoolVolume;
use crate::spi::block::VolumeAccess;
use crate::spi::block::VolumeJob;
use crate::spi::block::VolumePool;
use crate::spi::block::VolumeSnapshot;

#[async_trait]
impl VolumePool for RemotePart {
    fn snapshots(&self) -> Option<&dyn Converge<VolumeSnapshot>> {
        self.first.as_deref().map(|part| part as _)
    }

    fn jobs(&self) -> Option<&dyn Converge<VolumeJob>> {
        self.second.as_deref().map(|part| part as _)
    }

    async fn fence(&self, cx: &Ctx, volume: Id<PoolVolume>, below: Term) -> Result<Fenced> {
        self.call("fence", cx, &(volume, below)).await
    }
}

impl VolumeAccess for RemotePart {}

pub(super) async fn answer_pool(pool: &dyn VolumePool, ask: &Ask, cx: Option<&Ctx>) -> Result<Answer> {
    match (ask.part, ask.verb.as_str()) {
        (Part::Snapshots(_), _) => converge(pool.snapshots().ok_or_else(|| no_verb(ask))?, ask, cx).await,
        (Part::Jobs(_), _) => converge(pool.jobs().ok_or_else(|| no_verb(ask))?, ask, cx).await,
        (_, "fence") => {
            let (volume, below) = decode(&ask.args)?;
            Answer::of(&pool.fence(need(cx)?, volume, below).await?)
        }
        _ => converge::<PoolVolume>(pool, ask, cx).await,
    }
}
