//! The gRPC Echo service of `echo.proto`, server and client, without generated code.

use http::uri::PathAndQuery;

/// `/package.Service/Method`.
pub(crate) const PATH: &str = "/adit.samples.v1.Echo/Echo";

/// `EchoRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct EchoRequest {
    #[prost(string, tag = "1")]
    pub(crate) message: String,
}

/// `EchoResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct EchoResponse {
    #[prost(string, tag = "1")]
    pub(crate) message: String,
    #[prost(string, tag = "2")]
    pub(crate) server: String,
    #[prost(string, tag = "3")]
    pub(crate) version: String,
    #[prost(string, tag = "4")]
    pub(crate) peer: String,
}

/// Calls the service over `channel`.
pub(crate) async fn call(
    channel: tonic::transport::Channel,
    message: String,
) -> Result<EchoResponse, tonic::Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready()
        .await
        .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let codec: tonic_prost::ProstCodec<EchoRequest, EchoResponse> = Default::default();
    let request = tonic::Request::new(EchoRequest { message });
    let path = PathAndQuery::from_static(PATH);
    Ok(grpc.unary(request, path, codec).await?.into_inner())
}
