//! [`MeterSink`] over the wire.

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;
use serde::Serialize;

use super::client::RemotePart;
use super::client::unreadable;
use super::frame::Ask;
use super::frame::decode;
use super::frame::encode;
use super::server::Answer;
use super::server::no_verb;
use crate::Id;
use crate::Result;
use crate::model::PriceBook;
use crate::model::PriceBookSpec;
use crate::model::Project;
use crate::spi::meter::Bill;
use crate::spi::meter::MeterSink;
use crate::spi::meter::UsageEvent;

#[derive(Debug, Serialize, Deserialize)]
struct BillArgs {
    project: Id<Project>,
    from: Timestamp,
    to: Timestamp,
    book: Id<PriceBook>,
    prices: PriceBookSpec,
}

#[async_trait]
impl MeterSink for RemotePart {
    async fn append(&self, batch: &[UsageEvent]) -> Result<()> {
        let events = batch.iter().map(|e| encode(e).map(Bytes::from)).collect::<Result<Vec<_>>>()?;
        unreadable(&self.raw(None, "append", None, &events).await?)
    }

    async fn bill(
        &self,
        project: Id<Project>,
        from: Timestamp,
        to: Timestamp,
        book: Id<PriceBook>,
        prices: &PriceBookSpec,
    ) -> Result<Bill> {
        let args = BillArgs { project, from, to, book, prices: prices.clone() };
        unreadable(&self.raw(None, "bill", None, &args).await?)
    }
}

pub(super) async fn answer(meter: &dyn MeterSink, ask: &Ask) -> Result<Answer> {
    match ask.verb.as_str() {
        "append" => {
            // An event that is not understood fails the batch: none may be lost.
            let events: Vec<Bytes> = decode(&ask.args)?;
            let events = events.iter().map(|e| decode(e)).collect::<Result<Vec<UsageEvent>>>()?;
            Answer::of(&meter.append(&events).await?)
        }
        "bill" => {
            let BillArgs { project, from, to, book, prices } = decode(&ask.args)?;
            Answer::of(&meter.bill(project, from, to, book, &prices).await?)
        }
        _ => Err(no_verb(ask)),
    }
}
